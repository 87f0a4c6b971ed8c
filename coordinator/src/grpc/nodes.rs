//! NodeService.

use std::sync::Arc;

use muster_core::types::{Millis, NodeName, Owner, limits};
use muster_core::{Input, Node, Reply};
use muster_proto::convert::{self, field_error};
use muster_proto::v1::{self, node_service_server::NodeService};
use tonic::{Request, Response, Status};

use super::jobs::{PAGE_BYTES_MAX, REASON_BYTES_MAX, SHOWN_AT_ONCE};
use super::{Api, Followed, caller, unexpected_reply};
use crate::view;

/// Nodes on a page.
const PAGE_MAX: u32 = 1000;

#[tonic::async_trait]
impl NodeService for Api {
    async fn list_nodes(
        &self,
        request: Request<v1::ListNodesRequest>,
    ) -> Result<Response<v1::ListNodesResponse>, Status> {
        let (mut after, size) = checked_page(request.into_inner())?;
        let driver = self.driver()?;
        let (mut page, mut bytes) = (Vec::new(), 0);
        loop {
            let some = driver.read(|state| {
                state.nodes_after(after.as_ref()).take(SHOWN_AT_ONCE).cloned().collect::<Vec<Arc<Node>>>()
            })?;
            let Some(last) = some.last() else { break };
            after = Some(last.name.clone());
            for node in some {
                let shown = view::node(&node);
                bytes += prost::Message::encoded_len(&shown);
                if page.len() >= size || (bytes > PAGE_BYTES_MAX && !page.is_empty()) {
                    let next_page_token = page.last().map(|last: &v1::Node| last.name.clone());
                    let next_page_token = next_page_token.unwrap_or_default();
                    return Ok(Response::new(v1::ListNodesResponse { nodes: page, next_page_token }));
                }
                page.push(shown);
            }
            tokio::task::yield_now().await;
        }
        Ok(Response::new(v1::ListNodesResponse { nodes: page, next_page_token: String::new() }))
    }

    async fn get_node(
        &self,
        request: Request<v1::GetNodeRequest>,
    ) -> Result<Response<v1::GetNodeResponse>, Status> {
        let name = request.into_inner().node_name;
        let found = self.driver()?.read(|state| state.node(&name).cloned())?;
        let node = found.map_err(crate::driver::RequestError::from)?;
        Ok(Response::new(v1::GetNodeResponse { node: Some(view::node(&node)) }))
    }

    type WatchNodesStream = Followed<v1::WatchNodesResponse>;

    async fn watch_nodes(
        &self,
        _request: Request<v1::WatchNodesRequest>,
    ) -> Result<Response<Self::WatchNodesStream>, Status> {
        self.clone().stream_nodes().map(Response::new)
    }

    async fn cordon_node(
        &self,
        request: Request<v1::CordonNodeRequest>,
    ) -> Result<Response<v1::CordonNodeResponse>, Status> {
        let by = caller(&request)?.caller().name;
        let v1::CordonNodeRequest { node_name, reason } = request.into_inner();
        check_reason(&reason)?;
        let node = Some(self.change(Input::SetCordon { by, node: node_name, cordon: Some(reason) }).await?);
        Ok(Response::new(v1::CordonNodeResponse { node }))
    }

    async fn drain_node(
        &self,
        request: Request<v1::DrainNodeRequest>,
    ) -> Result<Response<v1::DrainNodeResponse>, Status> {
        let by = caller(&request)?.caller().name;
        let node = Some(self.change(checked_drain(by, request.into_inner())?).await?);
        Ok(Response::new(v1::DrainNodeResponse { node }))
    }

    async fn uncordon_node(
        &self,
        request: Request<v1::UncordonNodeRequest>,
    ) -> Result<Response<v1::UncordonNodeResponse>, Status> {
        let by = caller(&request)?.caller().name;
        let node_name = request.into_inner().node_name;
        let node = Some(self.change(Input::SetCordon { by, node: node_name, cordon: None }).await?);
        Ok(Response::new(v1::UncordonNodeResponse { node }))
    }
}

/// The node after which the page begins, and its size.
pub(crate) fn checked_page(request: v1::ListNodesRequest) -> Result<(Option<NodeName>, usize), Status> {
    let after = match request.page_token {
        empty if empty.is_empty() => None,
        token => Some(
            NodeName::new(token)
                .map_err(|why| convert::invalid_argument(&[field_error("page_token", why)]))?,
        ),
    };
    let size = if request.page_size == 0 { PAGE_MAX } else { request.page_size.min(PAGE_MAX) };
    Ok((after, size as usize))
}

pub(crate) fn checked_drain(by: Option<Owner>, request: v1::DrainNodeRequest) -> Result<Input, Status> {
    let v1::DrainNodeRequest { node_name, reason, timeout } = request;
    check_reason(&reason)?;
    let span = convert::span_from_wire("timeout", timeout.as_ref(), Millis(0));
    let span = span.map_err(|error| convert::invalid_argument(&[error]))?;
    if span > limits::SPAN_MAX {
        return Err(convert::invalid_argument(&[field_error("timeout", "is longer than 24h")]));
    }
    Ok(Input::Drain { by, node: node_name, reason, timeout: timeout.map(|_| span) })
}

fn check_reason(reason: &str) -> Result<(), Status> {
    if reason.len() > REASON_BYTES_MAX {
        let why = format!("has {} bytes; at most {REASON_BYTES_MAX} fit", reason.len());
        return Err(convert::invalid_argument(&[field_error("reason", why)]));
    }
    Ok(())
}

impl Api {
    async fn change(&self, input: Input) -> Result<v1::Node, Status> {
        match self.driver()?.request(input).await? {
            Reply::Node(node) => Ok(view::node(&node)),
            Reply::Job(_) | Reply::Session(_) | Reply::Token(_) | Reply::Barred(_) => Err(unexpected_reply()),
        }
    }
}
