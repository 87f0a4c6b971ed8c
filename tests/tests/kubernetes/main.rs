//! deploy/kubernetes, rendered by kubectl as `kubectl apply -k` does, and checked: by the schemas of three versions of Kubernetes,
//! and by what no schema sees. Nothing is applied: there is no cluster here.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod enums;
mod flags;
mod objects;
mod privileges;
mod references;
mod runs;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use muster_tests::{Netns, Outcome, grpcurl_path, python, skip};

use objects::Objects;

/// The oldest with gRPC probes beyond their beta that has schemas, one of the middle, and the newest.
const VERSIONS: [&str; 3] = ["1.27", "1.32", "1.37"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The overlays, and one more that adds every component to the largest. None where kubectl could not be brought.
fn rendered() -> Option<Vec<(String, Objects)>> {
    let kubectl = root().join(".deps/bin/kubectl");
    if !kubectl.is_file() {
        skip("the Kubernetes manifests", "`cargo xtask setup --tools` has brought no kubectl");
        return None;
    }
    let copy = tempfile::tempdir().unwrap();
    let copied =
        Command::new("cp").arg("-r").arg(root().join("deploy/kubernetes")).arg(copy.path()).status().unwrap();
    assert!(copied.success());
    let overlays = copy.path().join("kubernetes/overlays");
    std::fs::create_dir(overlays.join("all")).unwrap();
    let components = ["hostnetwork", "infiniband", "monitoring", "topology"];
    let mut text = "namespace: muster\nresources: [../ha]\ncomponents:\n".to_owned();
    text.extend(components.map(|name| format!("  - ../../components/{name}\n")));
    std::fs::write(overlays.join("all/kustomization.yaml"), text).unwrap();
    let render = |overlay: &str| {
        let rendered = Outcome::of(Command::new(&kubectl).arg("kustomize").arg(overlays.join(overlay)));
        assert_eq!(rendered.stderr, "", "kubectl has something to say about {overlay}");
        (overlay.to_owned(), Objects::parse(&rendered.ok()))
    };
    Some(["dev", "gpu", "ha", "all"].map(render).into())
}

/// Every check that is ours, with what it finds wrong.
fn complaints(objects: &Objects) -> Vec<String> {
    let mut found = references::check(objects);
    found.extend(privileges::check(objects));
    found.extend(enums::check(objects));
    found
}

#[test]
fn the_schemas_of_three_versions_hold() {
    let Some(rendered) = rendered() else { return };
    let validate = root().join(".deps/kubernetes-validate");
    if !validate.is_dir() {
        return skip(
            "the schemas of Kubernetes",
            "`cargo xtask setup --tools` has brought no kubernetes-validate",
        );
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    let run = |version: &str| {
        let mut command = Command::new(python());
        command.env("PYTHONPATH", &validate).args(["-m", "kubernetes_validate", "--strict", "-k", version]);
        Outcome::of(command.arg(file.path()))
    };
    for (overlay, objects) in &rendered {
        // Kinds that an operator brings are in no version's schema.
        std::fs::write(file.path(), objects.text_without("monitoring.coreos.com/v1")).unwrap();
        for version in VERSIONS {
            let outcome = run(version);
            assert_eq!(outcome.code, 0, "{overlay} on {version}: {outcome:?}");
        }
    }
    let wrong = rendered[0].1.text.replace("terminationGracePeriodSeconds:", "terminationGraceSeconds:");
    std::fs::write(file.path(), wrong).unwrap();
    assert_ne!(run(VERSIONS[0]).code, 0, "a field that does not exist is found");
}

#[test]
fn what_no_schema_sees_holds() {
    let Some(rendered) = rendered() else { return };
    for (overlay, objects) in &rendered {
        let found = complaints(objects);
        assert!(found.is_empty(), "{overlay}:\n{}", found.join("\n"));
    }
}

#[test]
fn each_mistake_is_found() {
    let Some(rendered) = rendered() else { return };
    let (_, all) = rendered.last().unwrap();
    for (right, wrong, words) in [
        ("targetPort: grpc", "targetPort: rpc", "has no port rpc"),
        ("containerPort: 7073", "containerPort: 7074", "probes port 7073"),
        (
            "secretName: muster-tls",
            "secretName: muster-tlss",
            "no command of the README makes the secret muster-tlss",
        ),
        ("      key: lease", "      key: least", "has no key least"),
        (
            "mountPath: /dev/shm\n          name: shm",
            "mountPath: /dev/shm\n          name: sham",
            "mounts sham, which is no volume",
        ),
        (
            "serviceName: muster-coordinator",
            "serviceName: muster-coordinators",
            "muster-coordinators is no headless Service",
        ),
        ("https://muster-coordinator-2.", "https://muster-coordinator-3.", "muster-coordinator-3 is no pod"),
        ("muster-etcd-2.muster-etcd:2379", "muster-etcd-2.muster-etcd:2378", "muster-etcd has no port 2378"),
        ("serviceAccountName: muster-worker", "serviceAccountName: muster-workers", "is no ServiceAccount"),
        ("$(POD_NAME).muster-coordinator", "$(POD).muster-coordinator", "$(POD) is no variable"),
        ("automountServiceAccountToken: false\n      containers", "containers", "would get a token"),
        ("runAsNonRoot: true", "runAsNonRoot: false", "runs as root"),
        ("- SYS_RESOURCE", "- SYS_ADMIN", "adds SYS_ADMIN"),
        ("- SYS_RESOURCE", "- KILL", "cannot lock memory"),
        ("- SETUID", "- SETGID", "cannot start ranks as another user"),
        ("name: MUSTER_RUN_AS", "name: MUSTER_RUN", "runs ranks as root"),
        ("        image: registry.example.com/muster:0.1.0", "        image: muster", "has the image muster"),
        (
            "whenUnsatisfiable: ScheduleAnyway",
            "whenUnsatisfiable: ScheduleAnyways",
            "whenUnsatisfiable: ScheduleAnyways",
        ),
        ("--stop-grace-max=4m", "--stop-grace-max=5m", "is killed before its ranks have had their time"),
        ("ipFamilyPolicy: PreferDualStack", "ipFamilies: [IPv4]", "has one family of addresses"),
        ("  maxUnavailable: 1", "  maxUnavailable: 0", "lets no pod go"),
        ("- --tls-dir=/etc/muster/tls", "- --insecure", "has no TLS"),
    ] {
        assert!(all.text.contains(right), "{right:?} is there to be spoilt");
        let found = complaints(&Objects::parse(&all.text.replace(right, wrong)));
        assert!(found.iter().any(|one| one.contains(words)), "{right:?} made {wrong:?}: {found:?}");
    }
}

#[test]
fn every_flag_is_one_that_the_program_takes() {
    let Some(rendered) = rendered() else { return };
    let of_pods = rendered.iter().flat_map(|(_, objects)| flags::check(objects));
    let all: BTreeSet<String> = of_pods.chain(flags::check_readme()).collect();
    assert!(all.is_empty(), "{}", all.into_iter().collect::<Vec<_>>().join("\n"));
}

#[test]
fn what_the_overlay_for_trying_it_says_runs() {
    let Some(rendered) = rendered() else { return };
    let (Some(netns), Some(_)) = (Netns::new(2), grpcurl_path()) else {
        return skip(
            "the pods' programs",
            "this machine lets us make no network namespaces, or there is no grpcurl",
        );
    };
    netns.add_v6();
    let (dir, dev) = (tempfile::tempdir().unwrap(), &rendered[0].1);
    let coordinator = runs::Pod::start(dev, "muster-coordinator", &netns, 0, dir.path());
    coordinator.is_well();
    let worker = runs::Pod::start(dev, "muster-worker", &netns, 1, dir.path());
    worker.is_well();
    coordinator.run_the_first_job();
}
