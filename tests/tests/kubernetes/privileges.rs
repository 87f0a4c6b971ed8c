//! Pods may do what they need and no more.

use serde_json::Value;

use crate::objects::{Objects, Workload, list, text};

/// Where the images of an installation come from, as the overlays say.
const REGISTRY: &str = "registry.example.com/";

/// What a daemon needs that is root and whose ranks are not.
const WORKER_CAPABILITIES: [&str; 6] = ["CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "SETGID", "SETUID"];
/// And for ranks that lock memory.
const LOCKS_MEMORY: &str = "SYS_RESOURCE";

/// What is wrong.
pub(crate) fn check(objects: &Objects) -> Vec<String> {
    let mut found = Vec::new();
    for kind in ["Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"] {
        found.extend(
            objects.of_kind(kind).keys().map(|name| format!("{kind} {name} gives rights that nobody needs")),
        );
    }
    for (name, account) in objects.of_kind("ServiceAccount") {
        if account["automountServiceAccountToken"] != false {
            found.push(format!("pods of the ServiceAccount {name} would get a token"));
        }
    }
    for workload in objects.workloads() {
        let is_worker = workload.name == "muster-worker";
        of_pod(&workload, is_worker, &mut found);
        for container in workload.containers() {
            let title = format!("{}, container {}", workload.title, text(&container["name"]));
            of_container(&title, container, is_worker, &mut found);
        }
    }
    found
}

fn of_pod(workload: &Workload<'_>, is_worker: bool, found: &mut Vec<String>) {
    let (title, pod) = (&workload.title, workload.pod);
    let mut rule = |holds: bool, words: &str| {
        if !holds {
            found.push(format!("{title} {words}"));
        }
    };
    let context = &pod["securityContext"];
    rule(pod["automountServiceAccountToken"] == false, "would get a token of the API server");
    rule(pod["enableServiceLinks"] == false, "would get variables of every Service");
    rule(context["seccompProfile"]["type"] == "RuntimeDefault", "may make any system call");
    rule(is_worker || context["runAsNonRoot"] == true, "runs as root");
    rule(is_worker || pod.get("hostNetwork").is_none(), "is on the host's network");
    rule(pod.get("hostPID").is_none() && pod.get("hostIPC").is_none(), "is in the host's namespaces");
    let host_paths = list(&pod["volumes"]).iter().filter_map(|volume| volume.get("hostPath"));
    let allowed = |path: &Value| is_worker && path["path"] == "/var/lib/muster-worker";
    rule(host_paths.into_iter().all(allowed), "sees more of the host than its own directory");
    if is_worker && context["runAsUser"] == 0 {
        let container = workload.containers().next().unwrap_or(&Value::Null);
        let variables = list(&container["env"]).iter();
        let run_as = variables.filter(|variable| variable["name"] == "MUSTER_RUN_AS").count();
        rule(run_as == 1, "runs ranks as root, who can read its token and its key");
        rule(context.get("fsGroup").is_none(), "lets the ranks' group read its token");
        let added = list(&container["securityContext"]["capabilities"]["add"]);
        let has = |needed: &str| added.iter().any(|one| one == needed);
        rule(WORKER_CAPABILITIES.iter().all(|needed| has(needed)), "cannot start ranks as another user");
    }
    if is_worker {
        let shm = list(&pod["volumes"]).iter().find(|volume| volume["name"] == "shm");
        rule(shm.is_some_and(|shm| shm["emptyDir"]["medium"] == "Memory"), "has no memory at /dev/shm");
    }
}

fn of_container(title: &str, container: &Value, is_worker: bool, found: &mut Vec<String>) {
    let context = &container["securityContext"];
    if context["allowPrivilegeEscalation"] != false || context.get("privileged").is_some() {
        found.push(format!("{title} may gain rights"));
    }
    if context["capabilities"]["drop"] != serde_json::json!(["ALL"]) {
        found.push(format!("{title} keeps capabilities"));
    }
    let added: Vec<&str> = list(&context["capabilities"]["add"]).iter().map(text).collect();
    found.extend(
        added
            .iter()
            .filter(|one| !is_worker || !(WORKER_CAPABILITIES.contains(one) || **one == LOCKS_MEMORY))
            .map(|one| format!("{title} adds {one}")),
    );
    let limits = container["resources"]["limits"].as_object();
    let has_rdma = limits.is_some_and(|limits| limits.keys().any(|key| key.starts_with("rdma/")));
    if has_rdma && !added.contains(&LOCKS_MEMORY) {
        found.push(format!("{title} cannot lock memory"));
    }
    if !is_worker && context["readOnlyRootFilesystem"] != true {
        found.push(format!("{title} may change its image"));
    }
    let image = text(&container["image"]);
    let ours =
        ["muster", "muster-worker"].map(|name| format!("{REGISTRY}{name}:{}", env!("CARGO_PKG_VERSION")));
    let has_tag = image
        .rsplit_once(':')
        .is_some_and(|(_, tag)| !tag.is_empty() && tag != "latest" && !tag.contains('/'));
    let named_muster = image.rsplit('/').next().is_some_and(|name| name.starts_with("muster"));
    if !has_tag || named_muster && !ours.contains(&image.to_owned()) {
        found.push(format!("{title} has the image {image}, not one of {}", ours.join(", ")));
    }
    let arguments: Vec<&str> = list(&container["args"]).iter().map(text).collect();
    let has = |flag: &str| arguments.iter().any(|one| one.starts_with(flag));
    // Beyond loopback none starts without TLS that was not told so; the overlay that does has one coordinator.
    let (encrypted, open) = (has("--tls-dir="), has("--insecure"));
    if arguments.first() == Some(&"coordinator") && (encrypted == open || has("--store=") && open) {
        found.push(format!("{title} would not start, or has no TLS"));
    }
}
