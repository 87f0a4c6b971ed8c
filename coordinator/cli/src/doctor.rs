//! `muster doctor`: what is wrong with this host, and how to mend it.

use std::time::{Duration, UNIX_EPOCH};

use muster_coordinator::LIVE;
use muster_core::types::Millis;
use muster_core::types::text::escape_json;
use muster_worker::doctor::{Asked, diagnose};
use muster_worker::{Diagnosis, Grade};

use tonic_health::pb::HealthCheckRequest;

use crate::args::{DoctorArgs, Global, Output};
use crate::client::Client;
use crate::exit::Failure;
use crate::output::{lines, out, table};

/// Where a coordinator is looked for if none is named.
const DEFAULT_URL: &str = "http://127.0.0.1:7070";
/// Time for a coordinator to answer.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// Most hosts that are tried at once, each by a thread.
const PEERS_MAX: usize = 64;

/// Looks, shows what was found, and fails if something is wrong.
pub(crate) async fn run(args: DoctorArgs, global: &Global) -> Result<(), Failure> {
    if args.peers.len() > PEERS_MAX {
        return Err(Failure::Usage(format!(
            "--peer names {} hosts; at most {PEERS_MAX} are tried",
            args.peers.len()
        )));
    }
    let (coordinator, coordinator_time) = ask_coordinator(global).await?;
    let asked = Asked {
        given: args.machine.given(),
        sysfs_root: args.machine.sysfs_root,
        data_dir: std::path::absolute(&args.data_dir).unwrap_or(args.data_dir),
        coordinator,
        coordinator_time,
        peers: args.peers,
    };
    let looking = tokio::task::spawn_blocking(move || diagnose(asked));
    let found = looking.await.map_err(anyhow::Error::from)?.map_err(anyhow::Error::msg)?;
    show(&found, global)?;
    if found.iter().any(|one| one.grade == Grade::Wrong) { Err(Failure::Unsound) } else { Ok(()) }
}

type Coordinator = Option<(String, Option<String>)>;

/// Whether it answers, and what time it has, as its answer says.
async fn ask_coordinator(global: &Global) -> Result<(Coordinator, Option<Millis>), Failure> {
    let urls = global.urls()?.join(",");
    let asking = async {
        let client = Client::connect(global).await?;
        // What nobody needs a token for.
        let live = HealthCheckRequest { service: LIVE.to_owned() };
        Ok::<_, Failure>(client.health().check(live).await?)
    };
    let why = match tokio::time::timeout(ANSWER_MAX, asking).await {
        Ok(Ok(answer)) => {
            let date = answer.metadata().get("date").and_then(|date| date.to_str().ok());
            let time = date.and_then(|date| httpdate::parse_http_date(date).ok());
            let since = time.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
            return Ok((Some((urls, None)), since.map(|since| Millis(since.as_millis() as u64))));
        }
        Ok(Err(Failure::Usage(why))) => return Err(Failure::Usage(why)),
        Ok(Err(failure)) => failure.why(),
        Err(_) => format!("it does not answer within {} s", ANSWER_MAX.as_secs()),
    };
    // Nobody has said that there should be one.
    let named = urls != DEFAULT_URL;
    Ok((named.then_some((urls, Some(why))), None))
}

fn show(found: &[Diagnosis], global: &Global) -> Result<(), Failure> {
    if global.output == Output::Json {
        for one in found {
            let json = serde_json::to_string(one).map_err(anyhow::Error::from)?;
            out!("{}", escape_json(&json));
        }
        return Ok(());
    }
    let name = |grade: Grade| match grade {
        Grade::Well => "well",
        Grade::Skipped => "skipped",
        Grade::Warning => "WARNING",
        Grade::Wrong => "WRONG",
    };
    let row = |one: &Diagnosis| vec![name(one.grade).to_owned(), one.check.clone(), one.found.clone()];
    lines(table(&["", "CHECK", "FOUND"], &found.iter().map(row).collect::<Vec<_>>()))?;
    let ill: Vec<&Diagnosis> = found.iter().filter(|one| one.grade >= Grade::Warning).collect();
    if !ill.is_empty() {
        out!("");
        out!("to mend:");
    }
    for one in ill {
        out!("  {}: {}", one.check, one.mend);
    }
    Ok(())
}
