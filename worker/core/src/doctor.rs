//! What is wrong with a host before its first job, and how to mend it. Pure: whoever calls has looked at the host.

use std::collections::BTreeMap;

use muster_core::{FabricPort, Inventory, PortState};
use serde::Serialize;

use crate::health::Space;

/// Open files that a job with many ranks, data loaders and connections needs.
const OPEN_FILES_MIN: u64 = 65_536;
/// Bytes of /dev/shm for each GPU: NCCL and data loaders exchange tensors there. Containers begin with 64 MiB.
const SHM_BYTES_MIN: u64 = 1 << 30;
/// Clocks that differ more than this make logs of two nodes hard to read and certificates invalid. The coordinator says its
/// time in whole seconds.
const SKEW_MAX_MS: u64 = 3_000;

/// What was looked at. What could not be is absent.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// What the machine has.
    pub inventory: Inventory,
    /// The devices by which programs reach fabric ports, each with why it cannot be opened. None if they are not this
    /// machine's own.
    pub verbs: Option<BTreeMap<String, Option<String>>>,
    /// Whether the kernel lets network cards write to GPUs; none if it is not this machine's.
    pub peer_memory: Option<bool>,
    /// Of the data directory.
    pub disk: Option<Space>,
    /// An address that other hosts may reach.
    pub address: Option<String>,
    /// The coordinator, and why it cannot be reached; none if none was named.
    pub coordinator: Option<(String, Option<String>)>,
    /// By how much the coordinator's clock differs.
    pub skew_ms: Option<u64>,
    /// Other hosts, each with why its ports cannot be reached.
    pub peers: BTreeMap<String, Option<String>>,
}

/// How well something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Grade {
    /// As it should be.
    Well,
    /// Not looked at; `found` says why.
    Skipped,
    /// Jobs run, and less well than they could.
    Warning,
    /// Jobs will fail, or be far slower than they should.
    Wrong,
}

/// What was found about one thing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Diagnosis {
    /// What it is about.
    pub check: String,
    /// How well it is.
    pub grade: Grade,
    /// What was seen, in words.
    pub found: String,
    /// What to do; empty if it is well.
    pub mend: String,
}

fn well(check: &str, found: impl Into<String>) -> Diagnosis {
    Diagnosis { check: check.to_owned(), grade: Grade::Well, found: found.into(), mend: String::new() }
}

fn skipped(check: &str, why: &str) -> Diagnosis {
    Diagnosis { check: check.to_owned(), grade: Grade::Skipped, found: why.to_owned(), mend: String::new() }
}

fn ill(check: &str, grade: Grade, found: impl Into<String>, mend: &str) -> Diagnosis {
    Diagnosis { check: check.to_owned(), grade, found: found.into(), mend: mend.to_owned() }
}

/// Everything that was found, in the order in which it is best mended.
pub fn examine(facts: &Facts) -> Vec<Diagnosis> {
    let mut all = vec![memlock(facts), open_files(facts), shm(facts)];
    all.extend(ports(&facts.inventory));
    all.push(verbs(facts));
    all.extend(gpus(facts));
    all.extend([disk(facts), address(facts), coordinator(facts), clock(facts)]);
    for (peer, why) in &facts.peers {
        let check = format!("peer {peer}");
        all.push(match why {
            None => well(&check, "its ports can be reached"),
            Some(why) => ill(
                &check,
                Grade::Wrong,
                why.clone(),
                "let nodes reach each other on all TCP ports: ranks meet at one that the system chooses",
            ),
        });
    }
    all
}

fn memlock(facts: &Facts) -> Diagnosis {
    let check = "memlock";
    match facts.inventory.memlock_bytes {
        None => well(check, "memory can be locked without a limit"),
        Some(_) if facts.inventory.fabric_ports.is_empty() => {
            skipped(check, "there is a limit, and no RDMA port that needs to lock memory")
        }
        Some(bytes) => ill(
            check,
            Grade::Wrong,
            format!("{} KiB of memory can be locked, and RDMA locks all of its buffers", bytes / 1024),
            "LimitMEMLOCK=infinity in the daemon's unit, `ulimit -l unlimited` before it starts, or --ulimit \
             memlock=-1 for its container",
        ),
    }
}

fn open_files(facts: &Facts) -> Diagnosis {
    match facts.inventory.open_files_max {
        Some(files) if files < OPEN_FILES_MIN => ill(
            "open files",
            Grade::Warning,
            format!("{files} files may be open; jobs with many ranks need {OPEN_FILES_MIN}"),
            "LimitNOFILE=1048576 in the daemon's unit, or `ulimit -n 1048576` before it starts",
        ),
        Some(files) => well("open files", format!("{files} files may be open")),
        None => well("open files", "files can be opened without a limit"),
    }
}

fn shm(facts: &Facts) -> Diagnosis {
    let (bytes, gpus) = (facts.inventory.shm_bytes, facts.inventory.gpus.len() as u64);
    let needed = SHM_BYTES_MIN * gpus.max(1);
    let mib = |bytes: u64| bytes >> 20;
    if bytes >= needed {
        return well("/dev/shm", format!("it may hold {} MiB", mib(bytes)));
    }
    let grade = if bytes < SHM_BYTES_MIN && gpus > 0 { Grade::Wrong } else { Grade::Warning };
    ill(
        "/dev/shm",
        grade,
        format!("it may hold {} MiB; {} MiB are needed, 1 GiB for each GPU", mib(bytes), mib(needed)),
        "`mount -o remount,size=50% /dev/shm`, --shm-size for a container, or a memory emptyDir at /dev/shm",
    )
}

fn ports(inventory: &Inventory) -> Vec<Diagnosis> {
    if inventory.fabric_ports.is_empty() {
        return vec![skipped("fabric", "there is no InfiniBand or RoCE port")];
    }
    let active: Vec<&FabricPort> = inventory.fabric_ports.iter().filter(|port| port.is_active()).collect();
    let mut rates: BTreeMap<u32, usize> = BTreeMap::new();
    for port in &active {
        *rates.entry(port.rate_mbps).or_default() += 1;
    }
    let usual = rates.iter().max_by_key(|(rate, count)| (**count, **rate)).map_or(0, |(rate, _)| *rate);
    let gbps = |mbps: u32| f64::from(mbps) / 1000.0;
    // Those elsewhere are for storage or management, and slower on purpose.
    let near: Vec<&String> = inventory.gpus.iter().flat_map(|gpu| &gpu.near_fabric).collect();
    let for_training =
        |port: &FabricPort| port.unfit.is_empty() && (near.is_empty() || near.contains(&&port.device));
    let of = |port: &FabricPort| {
        let check = format!("port {}", port.name());
        let found = format!("is {} ({})", port.state.name(), port.physical_state);
        match port.state {
            _ if !port.unfit.is_empty() => skipped(&check, &format!("{found}; not used: {}", port.unfit)),
            PortState::Active if port.rate_mbps < usual && for_training(port) => ill(
                &check,
                Grade::Warning,
                format!("has {} Gb/s ({}), and most have {}", gbps(port.rate_mbps), port.speed, gbps(usual)),
                "look at its cable and at the switch's port",
            ),
            PortState::Active => well(&check, format!("{found}, {} Gb/s", gbps(port.rate_mbps))),
            PortState::Init | PortState::Armed => ill(
                &check,
                Grade::Wrong,
                found,
                "no subnet manager configures it: start one (opensm) in its subnet",
            ),
            PortState::Down | PortState::ActiveDefer | PortState::Unknown => ill(
                &check,
                if for_training(port) { Grade::Wrong } else { Grade::Warning },
                format!("{found}: NCCL passes over it without a word"),
                "look at its cable and at the switch's port",
            ),
        }
    };
    inventory.fabric_ports.iter().map(of).collect()
}

fn verbs(facts: &Facts) -> Diagnosis {
    let check = "verbs devices";
    let Some(devices) = &facts.verbs else { return skipped(check, "the ports are not this machine's own") };
    let mend = "load ib_uverbs, give the container /dev/infiniband, or the daemon's user access to it";
    let refused = devices
        .iter()
        .find_map(|(device, why)| Some(format!("{device} cannot be opened: {}", why.as_ref()?)));
    match refused {
        Some(found) => ill(check, Grade::Wrong, found, mend),
        None if facts.inventory.fabric_ports.is_empty() => {
            skipped(check, "there is no InfiniBand or RoCE port")
        }
        None if devices.is_empty() => ill(
            check,
            Grade::Wrong,
            "there are ports, and no /dev/infiniband/uverbs* by which to use them",
            mend,
        ),
        None => well(check, format!("{} can be opened", devices.len())),
    }
}

fn gpus(facts: &Facts) -> Vec<Diagnosis> {
    let gpus = &facts.inventory.gpus;
    let fault = &facts.inventory.gpu_fault;
    if !fault.is_empty() {
        return vec![ill(
            "GPUs",
            Grade::Wrong,
            fault.clone(),
            "what it says; until then this host takes no jobs",
        )];
    }
    if gpus.is_empty() {
        return vec![skipped("GPUs", "there is none, or no NVIDIA driver")];
    }
    let mut all: Vec<Diagnosis> = gpus
        .iter()
        .filter_map(|gpu| {
            let fault = gpu.fault.clone()?;
            Some(ill(&format!("GPU {}", gpu.index), Grade::Wrong, fault, "reset it, or reboot the machine"))
        })
        .collect();
    if all.is_empty() {
        let driver = &facts.inventory.driver_version;
        all.push(well("GPUs", format!("{} are well, driver {driver}", gpus.len())));
    }
    if !facts.inventory.fabric_ports.is_empty() {
        all.push(match facts.peer_memory {
            None => skipped("GPUDirect", "the ports are not this machine's own"),
            Some(true) => well("GPUDirect", "nvidia_peermem is loaded"),
            Some(false) => ill(
                "GPUDirect",
                Grade::Warning,
                "nvidia_peermem is not loaded: unless NCCL can use dma-buf, tensors go through the memory of the host",
                "`modprobe nvidia_peermem`",
            ),
        });
    }
    all
}

fn disk(facts: &Facts) -> Diagnosis {
    let Some(disk) = facts.disk else { return skipped("disk", "the data directory is not there yet") };
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let found = format!("{:.1} of {:.1} GiB are free", gib(disk.free_bytes), gib(disk.total_bytes));
    if disk.is_low_for_logs() {
        let mend = "make room, or keep logs elsewhere (--data-dir)";
        return ill("disk", Grade::Warning, found, mend);
    }
    well("disk", found)
}

fn address(facts: &Facts) -> Diagnosis {
    match &facts.address {
        Some(address) => well("address", address.clone()),
        None => ill(
            "address",
            Grade::Warning,
            "this host has no address but loopback: no other node can reach it",
            "bring up an interface, and name its address with --address",
        ),
    }
}

fn coordinator(facts: &Facts) -> Diagnosis {
    match &facts.coordinator {
        None => skipped("coordinator", "none runs here, and no other was named with --coordinator"),
        Some((url, None)) => well("coordinator", format!("{url} answers")),
        Some((url, Some(why))) => ill(
            "coordinator",
            Grade::Wrong,
            format!("{url} cannot be reached: {why}"),
            "start it, or let this host through the firewall to that port",
        ),
    }
}

fn clock(facts: &Facts) -> Diagnosis {
    match facts.skew_ms {
        None => skipped("clock", "there is no coordinator to compare it with"),
        Some(ms) if ms > SKEW_MAX_MS => ill(
            "clock",
            Grade::Warning,
            format!("it differs from the coordinator's by {} s", ms / 1000),
            "start chrony or systemd-timesyncd on both",
        ),
        Some(_) => well("clock", "it agrees with the coordinator's"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use muster_core::Device;

    fn port(device: &str, state: PortState, rate_mbps: u32) -> FabricPort {
        let (device, physical_state) = (device.to_owned(), "LinkUp".to_owned());
        FabricPort { device, port: 1, state, rate_mbps, physical_state, ..FabricPort::default() }
    }

    /// A host that is as it should be.
    fn sound() -> Facts {
        let inventory = Inventory {
            gpus: (0..2).map(|index| Device { index, ..Device::default() }).collect(),
            fabric_ports: (0..3).map(|i| port(&format!("mlx5_{i}"), PortState::Active, 400_000)).collect(),
            shm_bytes: 64 << 30,
            open_files_max: Some(1 << 20),
            ..Inventory::default()
        };
        Facts {
            inventory,
            verbs: Some([("/dev/infiniband/uverbs0".to_owned(), None)].into()),
            peer_memory: Some(true),
            disk: Some(Space { free_bytes: 50 << 30, total_bytes: 100 << 30 }),
            address: Some("10.0.0.1".to_owned()),
            coordinator: Some(("http://c:7070".to_owned(), None)),
            skew_ms: Some(900),
            peers: [("n2".to_owned(), None)].into(),
        }
    }

    #[test]
    fn a_sound_host_is_found_to_be_so_and_each_defect_is_named_with_its_remedy() {
        type Break = fn(&mut Facts);
        let worst = |facts: &Facts| examine(facts).into_iter().max_by_key(|one| one.grade).unwrap();
        assert_eq!(worst(&sound()).grade, Grade::Well, "{:?}", examine(&sound()));
        let table: [(&str, Grade, &str, Break); 15] = [
            ("GPUs", Grade::Wrong, "takes no jobs", |f| f.inventory.gpu_fault = "it refuses".to_owned()),
            ("memlock", Grade::Wrong, "LimitMEMLOCK", |f| f.inventory.memlock_bytes = Some(8 << 20)),
            ("open files", Grade::Warning, "LimitNOFILE", |f| f.inventory.open_files_max = Some(1024)),
            ("/dev/shm", Grade::Wrong, "--shm-size", |f| f.inventory.shm_bytes = 64 << 20),
            ("/dev/shm", Grade::Warning, "--shm-size", |f| f.inventory.shm_bytes = 1 << 30),
            ("port mlx5_1:1", Grade::Wrong, "cable", |f| f.inventory.fabric_ports[1].state = PortState::Down),
            ("port mlx5_1:1", Grade::Wrong, "opensm", |f| {
                f.inventory.fabric_ports[1].state = PortState::Init;
            }),
            ("port mlx5_2:1", Grade::Warning, "cable", |f| f.inventory.fabric_ports[2].rate_mbps = 200_000),
            ("verbs devices", Grade::Wrong, "ib_uverbs", |f| f.verbs = Some(BTreeMap::new())),
            ("verbs devices", Grade::Wrong, "access", |f| {
                f.verbs = Some([("x".to_owned(), Some("denied".to_owned()))].into());
            }),
            ("GPU 1", Grade::Wrong, "reset", |f| f.inventory.gpus[1].fault = Some("lost".to_owned())),
            ("GPUDirect", Grade::Warning, "modprobe", |f| f.peer_memory = Some(false)),
            ("coordinator", Grade::Wrong, "firewall", |f| {
                f.coordinator = Some(("http://c:7070".to_owned(), Some("timed out".to_owned())));
            }),
            ("clock", Grade::Warning, "chrony", |f| f.skew_ms = Some(5000)),
            ("peer n2", Grade::Wrong, "ports", |f| {
                f.peers = [("n2".to_owned(), Some("timed out".to_owned()))].into();
            }),
        ];
        for (check, grade, mend, damage) in table {
            let mut facts = sound();
            damage(&mut facts);
            let worst = worst(&facts);
            assert_eq!((worst.check.as_str(), worst.grade), (check, grade), "{worst:?}");
            assert!(worst.mend.contains(mend), "{worst:?}");
        }
    }

    #[test]
    fn a_host_without_any_of_it_has_nothing_wrong() {
        let facts = Facts {
            inventory: Inventory { shm_bytes: 8 << 30, memlock_bytes: Some(8 << 20), ..Inventory::default() },
            address: Some("10.0.0.1".to_owned()),
            verbs: Some(BTreeMap::new()),
            ..Facts::default()
        };
        assert!(examine(&facts).iter().all(|one| one.grade <= Grade::Skipped), "{:?}", examine(&facts));
    }
}
