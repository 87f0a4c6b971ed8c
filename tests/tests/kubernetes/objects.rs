//! What was rendered, as objects, and how they are looked at.

use std::collections::BTreeMap;

use serde_json::Value;

/// All objects of an overlay.
pub(crate) struct Objects {
    /// As kubectl has written them.
    pub text: String,
    all: Vec<Value>,
}

/// What makes pods.
pub(crate) struct Workload<'a> {
    /// Kind and name.
    pub title: String,
    /// Its name.
    pub name: &'a str,
    /// The whole object.
    pub object: &'a Value,
    /// Of its pods.
    pub labels: &'a Value,
    /// Of its pods.
    pub pod: &'a Value,
}

impl Objects {
    /// Of the text of several documents.
    pub fn parse(text: &str) -> Self {
        let all: Vec<Value> = serde_saphyr::from_multiple(text).unwrap_or_else(|error| panic!("{error}"));
        assert!(all.len() > 8, "something was rendered: {text}");
        Self { text: text.to_owned(), all }
    }

    /// The text of those that are not of this API.
    pub fn text_without(&self, api: &str) -> String {
        let api = format!("apiVersion: {api}\n");
        self.text.split("---\n").filter(|text| !text.contains(&api)).collect::<Vec<_>>().join("---\n")
    }

    /// Every one.
    pub fn all(&self) -> &[Value] {
        &self.all
    }

    /// Those of a kind, by name.
    pub fn of_kind(&self, kind: &str) -> BTreeMap<&str, &Value> {
        self.all.iter().filter(|object| object["kind"] == kind).map(|object| (name(object), object)).collect()
    }

    /// Everything that makes pods.
    pub fn workloads(&self) -> Vec<Workload<'_>> {
        self.all.iter().filter(|object| object["spec"]["template"].is_object()).map(Workload::of).collect()
    }
}

impl<'a> Workload<'a> {
    fn of(object: &'a Value) -> Self {
        let template = &object["spec"]["template"];
        let (labels, pod) = (&template["metadata"]["labels"], &template["spec"]);
        let title = format!("{} {}", text(&object["kind"]), name(object));
        Self { title, name: name(object), object, labels, pod }
    }

    /// Those that start with the pod, too.
    pub fn containers(&self) -> impl Iterator<Item = &'a Value> {
        let pod = self.pod;
        ["initContainers", "containers"].into_iter().flat_map(move |which| list(&pod[which]))
    }

    /// Whether one of its containers has a port of this name or number.
    pub fn has_port(&self, port: &Value) -> bool {
        let mut ports = self.containers().flat_map(|container| list(&container["ports"]));
        ports.any(|declared| match port {
            Value::String(name) => declared["name"] == name.as_str(),
            number => declared["containerPort"] == *number,
        })
    }
}

/// Of an object.
pub(crate) fn name(object: &Value) -> &str {
    text(&object["metadata"]["name"])
}

/// Empty if it is none.
pub(crate) fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// Empty if it is none.
pub(crate) fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

/// Whether a selector, of either form, takes these labels.
pub(crate) fn selects(selector: &Value, labels: &Value) -> bool {
    let is_full = selector.get("matchLabels").is_some() || selector.get("matchExpressions").is_some();
    let pairs = if is_full { &selector["matchLabels"] } else { selector };
    let pairs = pairs.as_object().into_iter().flatten().all(|(key, value)| labels[key] == *value);
    pairs
        && list(&selector["matchExpressions"]).iter().all(|one| {
            assert_eq!(one["operator"], "In", "the only one that is in use");
            list(&one["values"]).contains(&labels[text(&one["key"])])
        })
}
