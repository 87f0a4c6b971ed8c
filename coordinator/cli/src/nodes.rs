//! Nodes for people, and as JSON.

mod machine;

use std::time::Duration;

use muster_proto::convert::duration_to_wire_std;
use muster_proto::v1;

use crate::args::{CordonArgs, DrainArgs, Global, NodeArgs, Output};
use crate::client::{Client, Retries};
use crate::exit::Failure;
use crate::json;
use crate::output::{lines, out, say, table};
use crate::units::show_bytes;

/// Time between looks at a node that is being emptied.
const DRAIN_LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// Columns of the list of nodes.
const HEADER: [&str; 7] = ["NODE", "ADDRESS", "STATE", "GPUS", "CORES", "MEMORY", "JOBS"];

/// `muster nodes`.
pub(crate) async fn nodes(global: &Global) -> Result<(), Failure> {
    let client = Client::connect(global).await?;
    let (mut rows, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = v1::ListNodesRequest { page_size: 0, page_token };
        let page = client.nodes().list_nodes(request).await?.into_inner();
        for node in page.nodes {
            if global.output == Output::Json {
                json::print("Node", &node)?;
            } else {
                rows.push(node_row(&node));
            }
        }
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    if global.output == Output::Text {
        lines(table(&HEADER, &rows))?;
    }
    Ok(())
}

fn node_state(node: &v1::Node) -> String {
    let state = node.state().as_str_name().trim_start_matches("NODE_STATE_").to_lowercase();
    let because = |what: &str, why: &str| match why {
        "" => format!(", {what}"),
        why => format!(", {what} ({why})"),
    };
    let by = |what: &str, who: &str| match who {
        "" => what.to_owned(),
        who => format!("{what} by {who}"),
    };
    let cordoned = by("cordoned", &node.cordoned_by);
    let cordon = if node.cordoned { because(&cordoned, &node.cordon_reason) } else { String::new() };
    let what = if node.job_ids.is_empty() { "drained" } else { "draining" };
    let drain = node.drain.as_ref().map(|drain| because(&by(what, &drain.drained_by), &drain.reason));
    let health = node.health.as_ref().and_then(|health| match health.verdict() {
        v1::HealthVerdict::Unspecified | v1::HealthVerdict::Healthy => None,
        v1::HealthVerdict::Degraded => Some(because("degraded", &health.reason)),
        v1::HealthVerdict::Quarantined => Some(because("quarantined", &health.reason)),
    });
    format!("{state}{cordon}{}{}", drain.unwrap_or_default(), health.unwrap_or_default())
}

fn node_row(node: &v1::Node) -> Vec<String> {
    let total = node.inventory.as_ref().and_then(|inventory| inventory.total).unwrap_or_default();
    let held = node.reserved.unwrap_or_default();
    let cores = |millis: u32| f64::from(millis) / 1000.0;
    vec![
        node.name.clone(),
        node.address.clone(),
        node_state(node),
        format!("{}/{}", held.gpus, total.gpus),
        format!("{}/{}", cores(held.cpu_millis), cores(total.cpu_millis)),
        format!("{}/{}", show_bytes(held.memory_bytes), show_bytes(total.memory_bytes)),
        if node.job_ids.is_empty() { "-".to_owned() } else { node.job_ids.join(",") },
    ]
}

fn print_node(node: &v1::Node, global: &Global) -> Result<(), Failure> {
    if global.output == Output::Json {
        json::print("Node", node)?;
        return Ok(());
    }
    lines(table(&HEADER, &[node_row(node)]))?;
    let inventory = node.inventory.clone().unwrap_or_default();
    out!("");
    out!("host {}, muster {}", inventory.hostname, inventory.version);
    if !node.leftover_gangs.is_empty() {
        out!("processes are left of {}; what they hold is not free", node.leftover_gangs.join(", "));
    }
    if !node.uncordoned_by.is_empty() {
        out!("given back by {}", node.uncordoned_by);
    }
    for (key, value) in &inventory.labels {
        out!("label {key}={value}");
    }
    let levels = ["zone", "spine", "leaf"].into_iter().zip(&node.location);
    let place: Vec<String> =
        levels.filter(|(_, name)| !name.is_empty()).map(|(level, name)| format!("{level} {name}")).collect();
    if !place.is_empty() {
        out!("in the network: {}", place.join(", "));
    }
    for finding in node.health.iter().flat_map(|health| &health.findings) {
        let severity = finding.severity().as_str_name().trim_start_matches("HEALTH_VERDICT_").to_lowercase();
        out!("{severity}: {}: {}", finding.subject, finding.reason);
    }
    lines(machine::show(&inventory))
}

async fn get_node(client: &Client, name: &str) -> Result<v1::Node, tonic::Status> {
    let request = v1::GetNodeRequest { node_name: name.to_owned() };
    Ok(client.nodes().get_node(request).await?.into_inner().node.unwrap_or_default())
}

/// `muster node`.
pub(crate) async fn node(args: &NodeArgs, global: &Global) -> Result<(), Failure> {
    let client = Client::connect(global).await?;
    print_node(&get_node(&client, &args.node_name).await?, global)
}

/// `muster cordon`.
pub(crate) async fn cordon(args: CordonArgs, global: &Global) -> Result<(), Failure> {
    let client = Client::connect(global).await?;
    let request = v1::CordonNodeRequest { node_name: args.node.node_name, reason: args.reason };
    print_node(&client.nodes().cordon_node(request).await?.into_inner().node.unwrap_or_default(), global)
}

/// `muster uncordon`.
pub(crate) async fn uncordon(args: NodeArgs, global: &Global) -> Result<(), Failure> {
    let client = Client::connect(global).await?;
    let request = v1::UncordonNodeRequest { node_name: args.node_name };
    print_node(&client.nodes().uncordon_node(request).await?.into_inner().node.unwrap_or_default(), global)
}

/// `muster drain`: asks for it, and stays until the node is empty.
pub(crate) async fn drain(args: DrainArgs, global: &Global) -> Result<(), Failure> {
    let client = Client::connect(global).await?;
    let request = v1::DrainNodeRequest {
        node_name: args.node.node_name,
        reason: args.reason,
        timeout: args.timeout.map(|span| duration_to_wire_std(span.0)),
    };
    let mut node = client.nodes().drain_node(request).await?.into_inner().node.unwrap_or_default();
    let (mut shown, mut retries) = (Vec::new(), Retries::default());
    while !args.no_wait && !node.job_ids.is_empty() {
        if shown != node.job_ids {
            say!("{}: waiting for {}", node.name, node.job_ids.join(", "));
            shown.clone_from(&node.job_ids);
        }
        tokio::time::sleep(DRAIN_LOOK_INTERVAL).await;
        match get_node(&client, &node.name).await {
            Ok(seen) => {
                retries.reset();
                node = seen;
            }
            Err(status) => retries.pause(status).await?,
        }
    }
    print_node(&node, global)
}
