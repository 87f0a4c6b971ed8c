//! What the launcher's environment says, read once and checked. Never connects.

use crate::error::Error;
use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

/// Long enough for a rank that writes a checkpoint while others wait; PyTorch's own default for NCCL.
pub const TIMEOUT_DEFAULT: Duration = Duration::from_mins(10);

/// The torchrun contract, as far as a process group needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    pub rank: usize,
    pub world_size: usize,
    pub local_rank: usize,
    pub master_addr: String,
    pub master_port: u16,
    /// The launcher hosts the store, and rank 0 is a client like the others.
    pub agent_store: bool,
    pub interface: Option<String>,
    /// The job and its generation, where Muster is the launcher: a rank of another one finds none of our keys, should it
    /// come to the port that once was its own.
    pub gang: Option<String>,
}

type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// `None` where no launcher started this process.
pub fn launch(lookup: Lookup<'_>) -> Result<Option<Launch>, Error> {
    const CORE: [&str; 4] = ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"];
    if CORE.iter().all(|name| lookup(name).is_none()) {
        return Ok(None);
    }
    let launch = Launch {
        rank: number(lookup, "RANK", "a rank from 0")?,
        world_size: number(lookup, "WORLD_SIZE", "the number of ranks")?,
        // Some launchers by hand leave it out; it only says which device of this machine is ours.
        local_rank: match lookup("LOCAL_RANK") {
            Some(_) => number(lookup, "LOCAL_RANK", "a local rank from 0")?,
            None => 0,
        },
        master_addr: text(lookup, "MASTER_ADDR")?,
        master_port: number(lookup, "MASTER_PORT", "a port")?,
        agent_store: lookup("TORCHELASTIC_USE_AGENT_STORE").as_deref() == Some("True"),
        // PyTorch takes a comma-separated list and spreads over it; we use its first interface.
        interface: lookup("GLOO_SOCKET_IFNAME")
            .and_then(|list| list.split(',').next().map(|name| name.trim().to_owned()))
            .filter(|name| !name.is_empty()),
        gang: lookup("MUSTER_JOB_ID").zip(lookup("MUSTER_GENERATION")).map(|(job, of)| format!("{job}.{of}")),
    };
    let bad = |name, expected| Error::BadVariable { name, value: lookup(name).unwrap_or_default(), expected };
    if launch.world_size == 0 || i32::try_from(launch.world_size).is_err() {
        return Err(bad("WORLD_SIZE", "a number of ranks from 1"));
    }
    if launch.rank >= launch.world_size {
        return Err(bad("RANK", "below WORLD_SIZE"));
    }
    Ok(Some(launch))
}

/// MUSTER_TIMEOUT_SECONDS, or the default.
pub fn timeout(lookup: Lookup<'_>) -> Result<Duration, Error> {
    const NAME: &str = "MUSTER_TIMEOUT_SECONDS";
    let Some(value) = lookup(NAME) else { return Ok(TIMEOUT_DEFAULT) };
    // A day at most: beyond that a timeout is a hang.
    match value.parse::<f64>() {
        Ok(seconds) if seconds > 0.0 && seconds <= 86_400.0 => Ok(Duration::from_secs_f64(seconds)),
        _ => Err(Error::BadVariable {
            name: NAME,
            value,
            expected: "a number of seconds above 0, at most 86400",
        }),
    }
}

/// The address of this machine that reaches the master, learnt from the routing table without a packet.
pub fn address_towards(master_addr: &str, master_port: u16) -> Result<IpAddr, Error> {
    let route = || -> std::io::Result<IpAddr> {
        let v4 = UdpSocket::bind("0.0.0.0:0")?;
        if v4.connect((master_addr, master_port)).is_ok() {
            return Ok(v4.local_addr()?.ip());
        }
        let v6 = UdpSocket::bind("[::]:0")?;
        v6.connect((master_addr, master_port))?;
        Ok(v6.local_addr()?.ip())
    };
    route().map_err(|source| Error::NoRoute { master: master_addr.to_owned(), source })
}

fn text(lookup: Lookup<'_>, name: &'static str) -> Result<String, Error> {
    lookup(name).filter(|value| !value.is_empty()).ok_or(Error::MissingVariable { name })
}

fn number<T: std::str::FromStr>(
    lookup: Lookup<'_>,
    name: &'static str,
    expected: &'static str,
) -> Result<T, Error> {
    let value = text(lookup, name)?;
    value.parse().map_err(|_| Error::BadVariable { name, value, expected })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TORCHRUN: [(&str, &str); 5] = [
        ("RANK", "3"),
        ("WORLD_SIZE", "4"),
        ("LOCAL_RANK", "1"),
        ("MASTER_ADDR", "node-1"),
        ("MASTER_PORT", "29500"),
    ];

    fn check(changes: &[(&str, Option<&str>)]) -> Result<Option<Launch>, String> {
        let lookup = |name: &str| {
            let replaced =
                changes.iter().find(|(n, _)| *n == name).map(|(_, value)| value.map(str::to_owned));
            replaced.unwrap_or_else(|| {
                TORCHRUN.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned())
            })
        };
        launch(&lookup).map_err(|error| error.to_string())
    }

    #[test]
    fn torchrun_environment_is_read() {
        let launch = check(&[
            ("TORCHELASTIC_USE_AGENT_STORE", Some("True")),
            ("GLOO_SOCKET_IFNAME", Some("ib0, eth0")),
        ])
        .unwrap()
        .unwrap();
        assert_eq!((launch.rank, launch.world_size, launch.local_rank), (3, 4, 1));
        assert_eq!((launch.master_addr.as_str(), launch.master_port), ("node-1", 29500));
        assert!(launch.agent_store);
        assert_eq!(launch.interface.as_deref(), Some("ib0"));
    }

    #[test]
    fn only_the_literal_true_means_an_agent_store() {
        for value in [None, Some("true"), Some("1"), Some("False"), Some("")] {
            assert!(!check(&[("TORCHELASTIC_USE_AGENT_STORE", value)]).unwrap().unwrap().agent_store);
        }
    }

    #[test]
    fn no_launcher_is_not_an_error() {
        let nothing =
            ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"].map(|name| (name, None));
        assert_eq!(check(&nothing), Ok(None));
    }

    #[test]
    fn each_refusal_names_the_variable() {
        for (name, value) in [
            ("RANK", None),
            ("RANK", Some("")),
            ("RANK", Some("-1")),
            ("RANK", Some("4")),
            ("WORLD_SIZE", None),
            ("WORLD_SIZE", Some("0")),
            ("WORLD_SIZE", Some("99999999999")),
            ("LOCAL_RANK", Some("x")),
            ("MASTER_ADDR", None),
            ("MASTER_PORT", Some("65536")),
        ] {
            let words = check(&[(name, value)]).unwrap_err();
            assert!(words.contains(name), "{words}");
        }
    }

    #[test]
    fn timeout_is_bounded() {
        assert_eq!(timeout(&|_| None).unwrap(), TIMEOUT_DEFAULT);
        assert_eq!(timeout(&|_| Some("1.5".into())).unwrap(), Duration::from_millis(1500));
        for value in ["0", "-1", "NaN", "inf", "soon", "86401"] {
            assert!(timeout(&|_| Some(value.into())).is_err(), "{value}");
        }
    }
}
