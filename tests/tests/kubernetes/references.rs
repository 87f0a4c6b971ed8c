//! Whatever one object says of another is so.

use serde_json::Value;

use crate::objects::{Objects, Workload, list, name, selects, text};
use crate::root;

/// What is wrong.
pub(crate) fn check(objects: &Objects) -> Vec<String> {
    let mut found = Vec::new();
    for workload in objects.workloads() {
        of_workload(objects, &workload, &mut found);
        let containers: Vec<&Value> = workload.containers().collect();
        for container in containers {
            of_container(objects, &workload, container, &mut found);
        }
    }
    for object in objects.all().iter().filter(|object| object["kind"] != "Namespace") {
        if object["metadata"]["namespace"] != "muster" {
            found.push(format!("{} {} is not in the namespace muster", text(&object["kind"]), name(object)));
        }
    }
    services(objects, &mut found);
    policies(objects, &mut found);
    budgets(objects, &mut found);
    names_in_text(objects, &mut found);
    found
}

fn of_workload(objects: &Objects, workload: &Workload<'_>, found: &mut Vec<String>) {
    let (title, spec) = (&workload.title, &workload.object["spec"]);
    if !selects(&spec["selector"], workload.labels) {
        found.push(format!("{title} does not select its own pods"));
    }
    for constraint in list(&workload.pod["topologySpreadConstraints"]) {
        if !selects(&constraint["labelSelector"], workload.labels) {
            found.push(format!("{title} spreads other pods than its own"));
        }
    }
    let account = text(&workload.pod["serviceAccountName"]);
    if !objects.of_kind("ServiceAccount").contains_key(account) {
        found.push(format!("{title}: {account:?} is no ServiceAccount"));
    }
    if workload.object["kind"] == "StatefulSet" {
        let service = text(&spec["serviceName"]);
        let is_headless = |service: &&Value| service["spec"]["clusterIP"] == "None";
        match objects.of_kind("Service").get(service).filter(|service| is_headless(service)) {
            Some(service) if service["spec"]["publishNotReadyAddresses"] == true => {}
            Some(_) => found.push(format!("{title}: pods that are not ready have no name")),
            None => found.push(format!("{title}: {service} is no headless Service")),
        }
    }
    let readme = std::fs::read_to_string(root().join("deploy/kubernetes/README.md")).unwrap_or_default();
    for volume in list(&workload.pod["volumes"]) {
        let secret = text(&volume["secret"]["secretName"]);
        if !secret.is_empty() && !readme.contains(&format!("create secret generic {secret} ")) {
            found.push(format!("{title}: no command of the README makes the secret {secret}"));
        }
        let map = text(&volume["configMap"]["name"]);
        if !map.is_empty() && !objects.of_kind("ConfigMap").contains_key(map) {
            found.push(format!("{title}: {map} is no ConfigMap"));
        }
    }
}

fn of_container(objects: &Objects, workload: &Workload<'_>, container: &Value, found: &mut Vec<String>) {
    let title = format!("{}, container {}", workload.title, text(&container["name"]));
    let claims = list(&workload.object["spec"]["volumeClaimTemplates"]).iter().map(name);
    let volumes: Vec<&str> =
        list(&workload.pod["volumes"]).iter().map(|volume| text(&volume["name"])).chain(claims).collect();
    for mount in list(&container["volumeMounts"]) {
        let volume = text(&mount["name"]);
        if !volumes.contains(&volume) {
            found.push(format!("{title} mounts {volume}, which is no volume"));
        }
    }
    for variable in list(&container["env"]) {
        let reference = &variable["valueFrom"]["configMapKeyRef"];
        if reference.is_null() {
            continue;
        }
        let (map, key) = (text(&reference["name"]), text(&reference["key"]));
        if !objects.of_kind("ConfigMap").get(map).is_some_and(|map| map["data"][key].is_string()) {
            found.push(format!("{title}: the ConfigMap {map:?} has no key {key}"));
        }
    }
    let arguments: Vec<&str> = list(&container["args"]).iter().map(text).collect();
    for (_, rest) in arguments
        .iter()
        .flat_map(|argument| argument.match_indices("$(").map(|(at, _)| argument.split_at(at)))
    {
        let variable = rest.split(')').next().unwrap_or_default().trim_start_matches("$(");
        if !list(&container["env"]).iter().any(|one| one["name"] == variable) {
            found.push(format!("{title}: $({variable}) is no variable"));
        }
    }
    let minutes =
        arguments.iter().find_map(|argument| argument.strip_prefix("--stop-grace-max=")?.strip_suffix('m'));
    let patience = workload.pod["terminationGracePeriodSeconds"].as_u64().unwrap_or(30);
    // A daemon whose ranks had all of their time still kills, reports and says goodbye.
    if minutes.is_some_and(|minutes| minutes.parse::<u64>().is_ok_and(|minutes| minutes * 60 + 30 > patience))
    {
        found.push(format!("{title} is killed before its ranks have had their time"));
    }
    for probe in ["startupProbe", "livenessProbe", "readinessProbe"].map(|probe| &container[probe]) {
        for port in [&probe["grpc"]["port"], &probe["httpGet"]["port"]] {
            if !port.is_null() && !workload.has_port(port) {
                found.push(format!("{title} probes port {port}, which it has not"));
            }
        }
        if probe["grpc"]["port"].is_string() {
            found.push(format!("{title}: gRPC probes take no names of ports"));
        }
    }
}

fn services(objects: &Objects, found: &mut Vec<String>) {
    for (name, service) in objects.of_kind("Service") {
        if service["spec"]["ipFamilyPolicy"] != "PreferDualStack" {
            found.push(format!("Service {name} has one family of addresses on clusters of two"));
        }
        let selector = &service["spec"]["selector"];
        let workloads = objects.workloads();
        let behind: Vec<_> = workloads.iter().filter(|one| selects(selector, one.labels)).collect();
        if behind.len() != 1 {
            found.push(format!("Service {name} selects the pods of {} workloads", behind.len()));
        }
        for port in list(&service["spec"]["ports"]) {
            let target = &port["targetPort"];
            found.extend(
                behind
                    .iter()
                    .filter(|one| !one.has_port(target))
                    .map(|one| format!("Service {name}: {} has no port {}", one.title, text(target))),
            );
        }
    }
}

fn policies(objects: &Objects, found: &mut Vec<String>) {
    let workloads = objects.workloads();
    let chosen = |selector: &Value| -> Vec<&Workload<'_>> {
        workloads.iter().filter(|one| selects(selector, one.labels)).collect()
    };
    for (name, policy) in objects.of_kind("NetworkPolicy") {
        let spec = &policy["spec"];
        let own = chosen(&spec["podSelector"]);
        let directions = [("ingress", "from", "Ingress"), ("egress", "to", "Egress")];
        for (rules, peers, kind) in directions {
            if spec[rules].is_array() && !list(&spec["policyTypes"]).contains(&kind.into()) {
                found.push(format!("NetworkPolicy {name} has rules of {rules} and does not say {kind}"));
            }
            for rule in list(&spec[rules]) {
                let peers = list(&rule[peers]).iter().filter_map(|peer| peer.get("podSelector"));
                let peers: Vec<_> = peers.map(chosen).collect();
                if peers.iter().any(Vec::is_empty) {
                    found.push(format!("NetworkPolicy {name} names pods that there are none of"));
                }
                let of_peers: Vec<_> = peers.into_iter().flatten().collect();
                let reached = if rules == "ingress" { &own } else { &of_peers };
                for port in list(&rule["ports"]).iter().map(|port| &port["port"]) {
                    // Of names, whoever serves them.
                    if *port != 53 && !reached.iter().all(|one| one.has_port(port)) {
                        found.push(format!("NetworkPolicy {name} opens {port}, where nobody listens"));
                    }
                }
            }
        }
        if own.is_empty() {
            found.push(format!("NetworkPolicy {name} selects no pods"));
        }
    }
    for workload in &workloads {
        let is_guarded = |policy: &&Value| selects(&policy["spec"]["podSelector"], workload.labels);
        if !objects.of_kind("NetworkPolicy").values().any(is_guarded) {
            found.push(format!("{}: no NetworkPolicy guards it", workload.title));
        }
    }
}

fn budgets(objects: &Objects, found: &mut Vec<String>) {
    for (name, budget) in objects.of_kind("PodDisruptionBudget") {
        let selector = &budget["spec"]["selector"];
        if !objects.workloads().iter().any(|one| selects(selector, one.labels)) {
            found.push(format!("PodDisruptionBudget {name} selects no pods"));
        }
        if budget["spec"]["maxUnavailable"].as_u64().is_none_or(|most| most == 0) {
            found.push(format!("PodDisruptionBudget {name} lets no pod go"));
        }
    }
}

/// Names of single pods, such as muster-etcd-0.muster-etcd:2379, wherever they are written.
fn names_in_text(objects: &Objects, found: &mut Vec<String>) {
    let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | ':');
    for word in objects.text.split(|c| !is_part(c)) {
        let Some((pod, rest)) = word.split_once(".muster-") else { continue };
        let Some((service, port)) = rest.split_once(':') else { continue };
        let service = format!("muster-{service}");
        let pod = pod.rsplit([':', '/']).next().unwrap_or_default();
        let sets = objects.of_kind("StatefulSet");
        let replicas = |set: &&&Value| set["spec"]["replicas"].as_u64().unwrap_or(1);
        let one = pod
            .rsplit_once('-')
            .and_then(|(set, ordinal)| Some((sets.get(set)?, ordinal.parse::<u64>().ok()?)));
        // A variable in its place is the pod's own name.
        let is_own = pod.is_empty();
        if !is_own && one.as_ref().is_none_or(|(set, ordinal)| *ordinal >= replicas(set)) {
            found.push(format!("{pod} is no pod"));
        }
        let services = objects.of_kind("Service");
        let ports = services.get(service.as_str()).map(|service| list(&service["spec"]["ports"]));
        let is_port =
            |declared: &Value| declared["port"].as_u64().is_some_and(|number| port.parse() == Ok(number));
        if !ports.is_some_and(|ports| ports.iter().any(is_port)) {
            found.push(format!("{service} has no port {port}"));
        }
    }
}
