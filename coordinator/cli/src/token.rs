//! `muster token`: what callers and nodes show where connections are encrypted.

use std::fs::{File, Permissions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, SystemTime};

use clap::Subcommand;
use muster_core::access::Role;
use muster_proto::convert::{duration_to_wire_std, role_to_wire};
use muster_proto::v1;

use crate::args::{Global, Output};
use crate::client::Client;
use crate::exit::Failure;
use crate::json;
use crate::output::{lines, out, say, table};
use crate::units::Span;

/// What is done with tokens.
#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a token and print it, this once. The first one is made on the coordinator's machine, by its Unix socket.
    #[command(
        after_help = "Example:\n  muster token create --coordinator unix:/var/lib/muster/muster.sock --role submitter --name ci\n  \
                      muster token create --coordinator unix:/var/lib/muster/muster.sock --role node --node gpu-7 > join"
    )]
    Create(CreateArgs),
    /// List tokens, without their secrets.
    #[command(after_help = "Example:\n  muster token list --output json")]
    List,
    /// Refuse a token from now on; or, as node:NAME, every certificate that a node has so far.
    #[command(after_help = "Example:\n  muster token revoke ci\n  muster token revoke node:gpu-7")]
    Revoke(RevokeArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct CreateArgs {
    /// What its bearer may do: viewers read, submitters also submit jobs and cancel their own, operators see
    /// and cancel all of them and also cordon and drain nodes,
    /// admins also make tokens; by one of the role node a node joins, and nothing else.
    #[arg(long, value_parser = role)]
    role: Role,
    /// Its name, by which it is revoked. Default: one is made.
    #[arg(long, default_value = "", hide_default_value = true)]
    name: String,
    /// How long it is good. Default: an hour for the role node, for ever for others.
    #[arg(long, value_name = "SPAN")]
    expires: Option<Span>,
    /// How many nodes can join by it, for the role node. Default: 1.
    #[arg(long, value_name = "N")]
    uses: Option<u32>,
    /// User of the nodes as whom the ranks of its bearer's jobs run, for submitters and operators. Default: as whom each node has
    /// for that.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "USER")]
    run_as: String,
    /// The only node that may join by it, for the role node. Default: any.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "NODE")]
    node: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct RevokeArgs {
    /// The token's name, or node:NAME.
    #[arg(value_name = "NAME")]
    name: String,
}

fn role(name: &str) -> Result<Role, String> {
    let found = Role::ALL.into_iter().find(|role| role.name() == name);
    found.ok_or_else(|| format!("give one of {}", Role::ALL.map(Role::name).join(", ")))
}

/// `muster token`.
pub(crate) async fn run(command: TokenCommand, global: &Global) -> Result<(), Failure> {
    let client = Client::connect(global).await?;
    match command {
        TokenCommand::Create(args) => create(args, &client, global).await,
        TokenCommand::List => list(&client, global).await,
        TokenCommand::Revoke(args) => {
            let request = v1::RevokeTokenRequest { name: args.name.clone() };
            client.tokens().revoke_token(request).await?;
            say!("{} is refused from now on", args.name);
            Ok(())
        }
    }
}

/// Takes the file that standard output goes to, if it is one, away from everybody but its user: a shell makes files that all
/// may read.
fn keep_private() -> io::Result<()> {
    let file = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    let found = file.metadata()?;
    let mode = found.permissions().mode() & 0o777;
    if found.is_file() && mode & 0o077 != 0 {
        file.set_permissions(Permissions::from_mode(mode & 0o700))?;
    }
    Ok(())
}

async fn create(args: CreateArgs, client: &Client, global: &Global) -> Result<(), Failure> {
    let CreateArgs { role, name, expires, uses, run_as, node } = args;
    if uses == Some(0) {
        return Err(Failure::Usage("--uses 0 is a token for nobody".to_owned()));
    }
    let request = v1::CreateTokenRequest {
        role: role_to_wire(role).into(),
        name,
        expires_in: expires.map(|span| duration_to_wire_std(span.0)),
        uses: uses.unwrap_or(0),
        run_as,
        node_name: node,
    };
    let made = client.tokens().create_token(request).await?.into_inner();
    if let Err(error) = keep_private() {
        say!("warning: others may be able to read the file with the token: {error}");
    }
    if global.output == Output::Json {
        return json::print("CreateTokenResponse", &made);
    }
    // For people, and not for the file into which the token is written.
    let name = made.token.unwrap_or_default().name;
    let how = match role {
        Role::Node => "muster worker --join-token-file FILE",
        Role::Viewer | Role::Submitter | Role::Operator | Role::Admin => {
            "muster … --token-file FILE, or grpcurl -H 'authorization: Bearer …'"
        }
    };
    say!("token {name}, shown this once; keep it in a file that only its user can read: {how}");
    out!("{}", made.secret);
    Ok(())
}

async fn list(client: &Client, global: &Global) -> Result<(), Failure> {
    let (mut rows, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = v1::ListTokensRequest { page_size: 0, page_token };
        let page = client.tokens().list_tokens(request).await?.into_inner();
        for token in page.tokens {
            if global.output == Output::Json {
                json::print("Token", &token)?;
            } else {
                rows.push(row(&token));
            }
        }
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    if global.output == Output::Text {
        lines(table(&["NAME", "ROLE", "EXPIRES", "USES LEFT", "NODE", "RUNS AS"], &rows))?;
    }
    Ok(())
}

fn row(token: &v1::Token) -> Vec<String> {
    let role = token.role().as_str_name().trim_start_matches("ROLE_").to_lowercase();
    let expires = token.expires.as_ref().map(|at| {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(at.seconds).unwrap_or(0));
        httpdate::fmt_http_date(at)
    });
    let uses = token.uses_left.map(|left| left.to_string());
    let expires = expires.unwrap_or_else(|| "never".to_owned());
    vec![
        token.name.clone(),
        role,
        expires,
        uses.unwrap_or_default(),
        token.node_name.clone(),
        token.run_as.clone(),
    ]
}
