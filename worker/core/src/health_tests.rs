//! What is found at looks, one after the other.

use super::*;
use muster_core::{Device, FabricPort, PortState};

fn readings(active: bool, link_downed: u64, errors: u64) -> Readings {
    let state = if active { PortState::Active } else { PortState::Down };
    let port = FabricPort { device: "mlx5_0".into(), port: 1, state, ..FabricPort::default() };
    let inventory = Inventory { fabric_ports: vec![port], ..Inventory::default() };
    let counters = [("mlx5_0:1".to_owned(), PortCounters { link_downed, errors })].into();
    Readings { inventory, counters, ..Readings::default() }
}

fn words(found: &[Finding]) -> Vec<String> {
    found
        .iter()
        .map(|finding| format!("{:?} {}: {}", finding.severity, finding.subject, finding.reason))
        .collect()
}

#[test]
fn ports_that_flap_or_stay_down_are_found_and_forgotten() {
    let flaps =
        |n: u64| format!("mlx5_0:1: its link went down {n} times within 10 minutes; look at its cable");
    let down = "Degraded mlx5_0:1: is DOWN, and was ACTIVE".to_owned();
    // Second; active; times that the link went down and errors, as the device counts; what is found.
    let table: [(u64, bool, u64, u64, Vec<String>); 12] = [
        (0, true, 7, 1000, vec![]),
        (10, false, 8, 1000, vec![]),
        (20, false, 8, 1000, vec![down]),
        (30, true, 8, 1599, vec![]),
        (
            40,
            true,
            9,
            1600,
            vec!["Degraded mlx5_0:1: 600 errors on its link within 10 minutes; look at its cable".into()],
        ),
        (635, true, 9, 1600, vec![]),
        (700, true, 12, 1600, vec![format!("Degraded {}", flaps(3))]),
        (710, true, 15, 1600, vec![format!("Quarantined {}", flaps(6))]),
        (1301, true, 15, 1600, vec![format!("Degraded {}", flaps(3))]),
        (1311, true, 15, 1600, vec![]),
        // The counters were reset.
        (1320, true, 1, 0, vec![]),
        (1330, true, 1, 0, vec![]),
    ];
    let mut monitor = Monitor::default();
    for (second, active, link_downed, errors, expected) in table {
        let found = monitor.look(Millis::from_secs(second), &readings(active, link_downed, errors));
        assert_eq!(words(&found), expected, "at {second}");
    }
}

#[test]
fn a_port_that_was_never_active_is_no_news() {
    let mut monitor = Monitor::default();
    for second in 0..5 {
        assert_eq!(monitor.look(Millis::from_secs(second), &readings(false, 0, 0)), []);
    }
    monitor.look(Millis::from_secs(6), &readings(true, 0, 0));
    let found = monitor.look(Millis::from_secs(7), &Readings::default());
    assert_eq!(words(&found), ["Degraded mlx5_0:1: is gone, and was ACTIVE; look for its device on the bus"]);
}

fn gpus(all: &[(u32, &str, Option<&str>)]) -> Readings {
    let gpu = |(index, uuid, fault): &(u32, &str, Option<&str>)| Device {
        index: *index,
        uuid: (*uuid).to_owned(),
        fault: fault.map(ToOwned::to_owned),
        ..Device::default()
    };
    let inventory = Inventory { gpus: all.iter().map(gpu).collect(), ..Inventory::default() };
    Readings { inventory, ..Readings::default() }
}

#[test]
fn a_faulty_gpu_is_taken_out_and_only_all_of_them_take_out_the_node() {
    type Look<'a> = (&'a [(u32, &'a str, Option<&'a str>)], &'a [&'a str]);
    let both = [(0, "A", None), (1, "B", None)];
    let table: [Look<'_>; 5] = [
        (&both, &[]),
        (&[(0, "A", None), (1, "", Some("it is lost"))], &["Degraded GPU 1: it is lost"]),
        (&[(0, "A", Some("x")), (1, "B", Some("y"))], &["Quarantined GPU 0: x", "Quarantined GPU 1: y"]),
        (
            &[(0, "B", None)],
            &["Quarantined GPUs: A is gone, and the others have new numbers; reboot the machine"],
        ),
        (&both, &[]),
    ];
    let mut monitor = Monitor::default();
    for (all, expected) in table {
        assert_eq!(words(&monitor.look(Millis(0), &gpus(all))), expected, "{all:?}");
    }
}

#[test]
fn space_has_to_be_well_above_before_it_is_enough_again() {
    const GIB: u64 = 1 << 30;
    // Free and total of the disk and of the memory; what is found.
    let disk = |severity: &str, free: &str| {
        format!("{severity} disk: {free} of 100.0 GiB are free where the daemon keeps logs; remove old ones")
    };
    let memory = "Degraded memory: 1.0 of 100.0 GiB are free".to_owned();
    let table: [((u64, u64), u64, Vec<String>); 8] = [
        ((6 * GIB, 100 * GIB), 50 * GIB, vec![]),
        ((4 * GIB, 100 * GIB), 50 * GIB, vec![disk("Degraded", "4.0")]),
        ((6 * GIB, 100 * GIB), 50 * GIB, vec![disk("Degraded", "6.0")]),
        ((1 << 20, 100 * GIB), 50 * GIB, vec![disk("Quarantined", "0.0")]),
        ((20 * GIB, 100 * GIB), GIB, vec![]),
        ((20 * GIB, 100 * GIB), GIB, vec![memory]),
        ((0, GIB), 50 * GIB, vec![]),
        // A hundredth of a large one is room enough.
        ((20 * GIB, 2_000 * GIB), 50 * GIB, vec![]),
    ];
    let mut monitor = Monitor::default();
    for ((free_bytes, total_bytes), available, expected) in table {
        let readings = Readings {
            disk: Some(Space { free_bytes, total_bytes }),
            memory: Some(Space { free_bytes: available, total_bytes: 100 * GIB }),
            ..Readings::default()
        };
        assert_eq!(words(&monitor.look(Millis(0), &readings)), expected, "{free_bytes} {available}");
    }
}

#[test]
fn checks_speak_by_their_exit_code_and_one_line() {
    let table = [
        (CheckEnd::Exited(Some(0)), "anything", None),
        (
            CheckEnd::Exited(Some(1)),
            r#"{"reason":"fan 3 is slow","more":1}"#,
            Some("Degraded check fans: fan 3 is slow"),
        ),
        (CheckEnd::Exited(Some(2)), "plain words\u{7}", Some("Quarantined check fans: plain words")),
        (CheckEnd::Exited(Some(2)), "", Some("Quarantined check fans: the check ended with exit code 2")),
        (
            CheckEnd::Exited(Some(127)),
            "",
            Some("Degraded check fans: the check is broken: it ended with exit code 127"),
        ),
        (CheckEnd::Exited(None), "x", Some("Degraded check fans: the check is broken: a signal ended it")),
        (CheckEnd::TimedOut, "", Some("Degraded check fans: the check does not end, and was killed")),
    ];
    for (end, line, expected) in table {
        let found: Vec<Finding> = judge_check("fans", end, line).into_iter().collect();
        assert_eq!(words(&found).first().map(String::as_str), expected, "{end:?} {line}");
    }
}

#[test]
fn rails_that_no_subnet_manager_configures_degrade_a_node_by_themselves() {
    let port = |device: &str, state, rate_mbps| FabricPort {
        device: device.into(),
        port: 1,
        state,
        rate_mbps,
        ..FabricPort::default()
    };
    let look = |rail| {
        let ports = vec![port("mlx5_0", rail, 400_000), port("mlx5_1", PortState::Active, 100_000)];
        let inventory = Inventory { fabric_ports: ports, ..Inventory::default() };
        Readings { inventory, ..Readings::default() }
    };
    let mut monitor = Monitor::default();
    assert_eq!(monitor.look(Millis(0), &look(PortState::Init)), [], "once is no finding");
    let found = words(&monitor.look(Millis(1), &look(PortState::Init)));
    let expected = "Degraded mlx5_0:1: is INIT: no subnet manager configures it, and ranks do without";
    assert_eq!(found, [expected]);
    assert_eq!(monitor.look(Millis(2), &look(PortState::Active)), []);
}

#[test]
fn a_driver_that_refuses_takes_out_the_node() {
    let mut monitor = Monitor::default();
    let refused = |why: &str| {
        let mut readings = gpus(&[]);
        readings.inventory.gpu_fault = why.to_owned();
        readings
    };
    let found = words(&monitor.look(Millis(0), &refused("versions differ")));
    assert_eq!(found, ["Quarantined GPUs: versions differ"]);
    // The first that answers says what there is.
    assert_eq!(monitor.look(Millis(1), &gpus(&[(0, "A", None)])), []);
    assert_eq!(words(&monitor.look(Millis(2), &refused("x"))), ["Quarantined GPUs: x"]);
    assert_eq!(monitor.look(Millis(3), &gpus(&[(0, "A", None)])), []);
}

#[test]
fn a_gpu_that_is_divided_otherwise_is_not_gone() {
    let gpu = |index: u32, uuid: &str, place: &str| Device {
        index,
        uuid: uuid.to_owned(),
        pci_address: place.to_owned(),
        ..Device::default()
    };
    let readings = |gpus: Vec<Device>| Readings {
        inventory: Inventory { gpus, ..Inventory::default() },
        ..Readings::default()
    };
    let whole = || gpu(1, "GPU-b", "0000:2a:00.0");
    let mut monitor = Monitor::default();
    let parts = |names: &[&str]| {
        let parts = (100..).zip(names).map(|(index, name)| gpu(index, name, "0000:1a:00.0"));
        readings(parts.chain([whole()]).collect())
    };
    assert_eq!(monitor.look(Millis(1), &parts(&["MIG-a", "MIG-b"])), []);
    assert_eq!(monitor.look(Millis(2), &parts(&["MIG-c"])), []);
    assert_eq!(monitor.look(Millis(3), &parts(&["GPU-a"])), []);
    let reason = &monitor.look(Millis(4), &readings(vec![whole()]))[0].reason;
    assert!(reason.starts_with("MIG-a, MIG-b is gone"), "{reason}");
}
