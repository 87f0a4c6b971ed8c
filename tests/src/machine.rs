//! A machine that is not there: 8 GPUs, each below one PCI switch with an HCA, on two NUMA nodes, and an HCA for storage
//! elsewhere. A tree in the form of /sys, and a file that says what has no place in it.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// GPUs, and HCAs that are next to one.
pub const RAILS: usize = 8;

/// How a rail differs from the others, which are ACTIVE InfiniBand with 400 Gb/s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rail {
    /// As it should be.
    Well,
    /// Its cable is out.
    Down,
    /// It speaks Ethernet.
    Roce,
    /// No subnet manager has configured it.
    Init,
    /// It has come up with half of its lanes.
    Slow,
}

/// The tree and the file of one fake machine.
#[derive(Debug)]
pub struct FakeMachine {
    /// What stands in the place of /sys.
    pub sys: PathBuf,
    /// What has no place in it: the GPUs.
    pub inventory: PathBuf,
}

impl FakeMachine {
    /// Makes it in a directory. `cpus` are the processors of the two NUMA nodes.
    pub fn make(dir: &Path, rails: [Rail; RAILS], cpus: [&str; 2]) -> Self {
        let this = Self { sys: dir.join("sys"), inventory: dir.join("inventory.json") };
        this.write("class/infiniband_mad/abi_version", "5\n");
        for (node, cpus) in cpus.iter().enumerate() {
            this.write(&format!("devices/system/node/node{node}/cpulist"), &format!("{cpus}\n"));
            let memory = format!("Node {node} MemTotal:       1056964608 kB\nNode {node} MemFree: 1 kB\n");
            this.write(&format!("devices/system/node/node{node}/meminfo"), &memory);
        }
        for (index, rail) in rails.into_iter().enumerate() {
            let bridge = format!("devices/pci0000:{index}0/0000:{index}0:01.0");
            this.device(&format!("{bridge}/0000:{index}2:00.0"), index / 4);
            this.hca(index, &format!("{bridge}/0000:{index}1:00.0"), index / 4);
            this.set_rail(index, rail);
        }
        // For storage: at a root port of its own.
        this.hca(RAILS, "devices/pci0000:80/0000:80:01.0/0000:81:00.0", 0);
        this.port(RAILS, "4: ACTIVE", "5: LinkUp", "200 Gb/sec (4X HDR)", "InfiniBand");
        this.set_faults(&[]);
        this
    }

    /// What a port shows from now on.
    pub fn set_rail(&self, index: usize, rail: Rail) {
        match rail {
            Rail::Well => self.port(index, "4: ACTIVE", "5: LinkUp", "400 Gb/sec (4X NDR)", "InfiniBand"),
            Rail::Down => self.port(index, "1: DOWN", "3: Disabled", "10 Gb/sec (4X SDR)", "InfiniBand"),
            Rail::Roce => self.port(index, "4: ACTIVE", "5: LinkUp", "400 Gb/sec (4X NDR)", "Ethernet"),
            Rail::Init => self.port(index, "2: INIT", "5: LinkUp", "400 Gb/sec (4X NDR)", "InfiniBand"),
            Rail::Slow => self.port(index, "4: ACTIVE", "5: LinkUp", "200 Gb/sec (2X NDR)", "InfiniBand"),
        }
    }

    /// Which GPUs have a fault from now on.
    pub fn set_faults(&self, faulty: &[usize]) {
        let gpu = |index: usize| {
            serde_json::json!({
                "index": index,
                "uuid": format!("GPU-{index}"),
                "model": "NVIDIA H100 80GB HBM3",
                "memoryBytes": "85520809984",
                "pciAddress": format!("0000:{index}2:00.0"),
                "fault": if faulty.contains(&index) { "it has fallen off the bus" } else { "" },
            })
        };
        let text = serde_json::json!({
            "gpus": (0..RAILS).map(gpu).collect::<Vec<_>>(),
            "total": { "cpuMillis": 64000, "memoryBytes": "2164663517184" },
            "hostname": "fake",
            "shmBytes": "1082331758592",
            "driverVersion": "550.54.15",
            "cudaVersion": "12.4",
        });
        // Renamed, so that nobody reads half of it.
        let new = self.inventory.with_extension("new");
        std::fs::write(&new, text.to_string()).unwrap();
        std::fs::rename(new, &self.inventory).unwrap();
    }

    /// A counter of a port, such as `counters/link_downed`.
    pub fn set_counter(&self, index: usize, name: &str, value: u64) {
        self.write(&format!("class/infiniband/mlx5_{index}/ports/1/{name}"), &format!("{value}\n"));
    }

    /// Devices by which programs use ports, in a /dev beside the tree; without these there are none
    /// of those.
    pub fn set_verbs_except(&self, missing: &[usize]) {
        let dev = self.sys.with_file_name("dev/infiniband");
        std::fs::create_dir_all(&dev).unwrap();
        for index in 0..=RAILS {
            let at = format!("class/infiniband/mlx5_{index}/device/infiniband_verbs/uverbs{index}/ibdev");
            self.write(&at, &format!("mlx5_{index}\n"));
            if !missing.contains(&index) {
                std::fs::write(dev.join(format!("uverbs{index}")), "").unwrap();
            }
        }
    }

    /// The flags by which a daemon takes itself for this machine.
    pub fn flags(&self) -> [&str; 4] {
        ["--sysfs-root", self.sys.to_str().unwrap(), "--inventory", self.inventory.to_str().unwrap()]
    }

    fn device(&self, at: &str, numa: usize) {
        self.write(&format!("{at}/numa_node"), &format!("{numa}\n"));
        let address = at.rsplit('/').next().unwrap();
        self.link(&format!("bus/pci/devices/{address}"), &format!("../../../{at}"));
    }

    fn hca(&self, index: usize, at: &str, numa: usize) {
        self.device(at, numa);
        self.write(&format!("{at}/net/ib{index}/dev_port"), "0\n");
        let dir = format!("class/infiniband/mlx5_{index}");
        self.write(&format!("{dir}/node_type"), "1: CA\n");
        self.write(&format!("{dir}/fw_ver"), "28.39.1002\n");
        self.write(&format!("{dir}/hw_rev"), "0\n");
        self.write(&format!("{dir}/hca_type"), "MT4129\n");
        self.write(&format!("{dir}/node_guid"), &format!("0200:0000:0000:00{index}0\n"));
        self.write(&format!("{dir}/sys_image_guid"), &format!("0200:0000:0000:00{index}0\n"));
        self.link(&format!("{dir}/device"), &format!("../../../{at}"));
        let mad = format!("class/infiniband_mad/umad{index}");
        self.write(&format!("{mad}/ibdev"), &format!("mlx5_{index}\n"));
        self.write(&format!("{mad}/port"), "1\n");
    }

    fn port(&self, index: usize, state: &str, physical: &str, rate: &str, layer: &str) {
        let dir = format!("class/infiniband/mlx5_{index}/ports/1");
        let gid = match layer {
            "Ethernet" => "0000:0000:0000:0000:0000:ffff:0a00:0001",
            _ => "fe80:0000:0000:0000:0200:0000:0000:0001",
        };
        for (file, text) in [
            ("state", state),
            ("phys_state", physical),
            ("rate", rate),
            ("link_layer", layer),
            ("lid", "0x1"),
            ("lid_mask_count", "0"),
            ("sm_lid", "0x1"),
            ("sm_sl", "0"),
            ("cap_mask", "0xa651e848"),
            ("gids/0", gid),
            ("pkeys/0", "0xffff"),
        ] {
            self.write(&format!("{dir}/{file}"), &format!("{text}\n"));
        }
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.sys.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let new = path.with_extension("new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, path).unwrap();
    }

    fn link(&self, path: &str, target: &str) {
        let path = self.sys.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(target, path).unwrap();
    }
}
