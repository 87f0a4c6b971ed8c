//! ClusterService.

use muster_proto::convert::{resources_to_wire, timestamp_to_wire};
use muster_proto::v1::{self, cluster_service_server::ClusterService};
use tonic::{Request, Response, Status};

use super::Api;
use crate::office::Reign;

#[tonic::async_trait]
impl ClusterService for Api {
    async fn get_cluster(
        &self,
        _request: Request<v1::GetClusterRequest>,
    ) -> Result<Response<v1::GetClusterResponse>, Status> {
        let Reign { driver, cluster_id, .. } = self.office.reign()?;
        let started = Some(timestamp_to_wire(driver.clock().started()));
        let (jobs, nodes, totals) =
            driver.read(|state| (state.jobs_total(), state.nodes_total(), state.totals()))?;
        let cluster = v1::Cluster {
            id: cluster_id.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started,
            nodes_ready: Some(totals.nodes_ready),
            nodes_total: Some(nodes as u32),
            jobs_queued: Some(jobs as u32 - totals.jobs_active - totals.jobs_ended),
            jobs_active: Some(totals.jobs_active),
            jobs_ended: Some(totals.jobs_ended),
            total: Some(resources_to_wire(totals.total.resources())),
            reserved: Some(resources_to_wire(totals.reserved.resources())),
        };
        Ok(Response::new(v1::GetClusterResponse { cluster: Some(cluster) }))
    }
}
