//! ClusterService.

use muster_core::NodeState;
use muster_core::types::Resources;
use muster_proto::convert::{resources_to_wire, timestamp_to_wire};
use muster_proto::v1::{self, cluster_service_server::ClusterService};
use tonic::{Request, Response, Status};

use super::Api;
use crate::driver::cluster_id;

#[tonic::async_trait]
impl ClusterService for Api {
    async fn get_cluster(
        &self,
        _request: Request<v1::GetClusterRequest>,
    ) -> Result<Response<v1::GetClusterResponse>, Status> {
        let driver = self.office.reign()?.driver;
        let started = Some(timestamp_to_wire(driver.clock().started()));
        let cluster = driver
            .read(move |core| {
                let (mut ready, mut all) = (0, 0);
                let (mut total, mut reserved) = (Resources::default(), Resources::default());
                for (state, inventory, held) in core.inventories() {
                    all += 1;
                    if *state == NodeState::Ready {
                        ready += 1;
                        total = total.plus(inventory.total);
                        reserved = reserved.plus(held.amount);
                    }
                }
                let (queued, ended) = (core.jobs_queued(), core.jobs_ended());
                v1::Cluster {
                    id: cluster_id(core),
                    version: env!("CARGO_PKG_VERSION").to_owned(),
                    started,
                    nodes_ready: Some(ready),
                    nodes_total: Some(all),
                    jobs_queued: Some(queued as u32),
                    jobs_active: Some((core.jobs_total() - queued - ended) as u32),
                    jobs_ended: Some(ended as u32),
                    total: Some(resources_to_wire(total)),
                    reserved: Some(resources_to_wire(reserved)),
                }
            })
            .await?;
        Ok(Response::new(v1::GetClusterResponse { cluster: Some(cluster) }))
    }
}
