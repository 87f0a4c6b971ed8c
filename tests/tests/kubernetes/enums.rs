//! Values that must be one of a few, which the schemas take for any text.

use serde_json::Value;

use crate::objects::{Objects, text};

const KNOWN: [(&str, &[&str]); 16] = [
    ("accessModes", &["ReadWriteOnce", "ReadWriteOncePod", "ReadWriteMany", "ReadOnlyMany"]),
    ("appProtocol", &["grpc", "http", "https"]),
    ("clusterIP", &["None"]),
    ("dnsPolicy", &["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"]),
    ("effect", &["NoSchedule", "PreferNoSchedule", "NoExecute"]),
    ("fsGroupChangePolicy", &["OnRootMismatch", "Always"]),
    ("imagePullPolicy", &["Always", "IfNotPresent", "Never"]),
    ("ipFamilyPolicy", &["PreferDualStack"]),
    ("medium", &["Memory", "HugePages"]),
    ("operator", &["In", "NotIn", "Exists", "DoesNotExist", "Equal"]),
    ("podManagementPolicy", &["Parallel", "OrderedReady"]),
    ("policyTypes", &["Ingress", "Egress"]),
    ("protocol", &["TCP", "UDP", "SCTP"]),
    (
        "type",
        &[
            "RuntimeDefault",
            "OnDelete",
            "RollingUpdate",
            "Directory",
            "DirectoryOrCreate",
            "ClusterIP",
            "Localhost",
        ],
    ),
    ("unhealthyPodEvictionPolicy", &["IfHealthyBudget", "AlwaysAllow"]),
    ("whenUnsatisfiable", &["DoNotSchedule", "ScheduleAnyway"]),
];

/// What is wrong.
pub(crate) fn check(objects: &Objects) -> Vec<String> {
    let mut found = Vec::new();
    for object in objects.all() {
        walk(object, &mut found);
    }
    found
}

fn walk(value: &Value, found: &mut Vec<String>) {
    for item in value.as_array().into_iter().flatten() {
        walk(item, found);
    }
    for (key, value) in value.as_object().into_iter().flatten() {
        let known = KNOWN.iter().find(|(name, _)| name == key).map(|(_, known)| *known);
        let values = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        for value in values.iter().filter(|value| value.is_string()) {
            if known.is_some_and(|known| !known.contains(&text(value))) {
                found.push(format!(
                    "{key}: {} is none of {}",
                    text(value),
                    known.unwrap_or_default().join(", ")
                ));
            }
        }
        walk(value, found);
    }
}
