//! NVIDIA GPUs, from the driver's own library, or from its files in /proc where that cannot be loaded. A machine without
//! the library has no GPUs, and nothing is wrong with it.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use muster_core::{Device, Inventory};
use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::{EccCounter, MemoryError};
use nvml_wrapper::error::NvmlError;
use tracing::warn;

use super::{Discovery, pci};

/// By this name the library is there without its development files.
const LIBRARY: &str = "libnvidia-ml.so.1";

/// NVML_DEVICE_MIG_ENABLE
const MIG_ENABLED: u32 = 1;
/// Indices of parts of GPU 0 begin here, those of GPU 1 at twice as much: none is that of a GPU,
/// and the number shows which it is of. A GPU has at most 7 parts with devices of their own.
const PARTS_FROM: u32 = 100;
/// Parts that are taken from CUDA_VISIBLE_DEVICES: those of 16 GPUs.
const PARTS_NAMED_MAX: usize = 16 * 7;

#[derive(Debug)]
pub(super) struct Gpus {
    root: PathBuf,
    /// The daemon's own CUDA_VISIBLE_DEVICES: only those in it are ours to give.
    visible: Option<String>,
    /// Loaded once, at the first look; none where there is no driver, and else why it refuses.
    library: OnceLock<Result<Option<Nvml>, String>>,
}

impl Gpus {
    /// Asks the driver's library.
    pub fn by_driver() -> Self {
        let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
        Self { root: "/".into(), visible, library: OnceLock::new() }
    }

    /// Reads files alone.
    pub fn by_files() -> Self {
        Self { library: OnceLock::from(Ok(None)), ..Self::by_driver() }
    }

    fn library(&self) -> Result<Option<&Nvml>, &String> {
        let load = || match Nvml::builder().lib_path(OsStr::new(LIBRARY)).init() {
            Ok(nvml) => Ok(Some(nvml)),
            Err(error) => {
                let has_driver = self.root.join("proc/driver/nvidia/version").exists();
                let why = refusal(&error, has_driver);
                if let Some(why) = &why {
                    warn!(%error, "{why}");
                }
                why.map_or(Ok(None), Err)
            }
        };
        self.library.get_or_init(load).as_ref().map(Option::as_ref)
    }
}

impl Discovery for Gpus {
    fn discover(&self, found: &mut Inventory) {
        let wanted: Option<Vec<&str>> =
            self.visible.as_ref().map(|visible| visible.split(',').map(str::trim).collect());
        let is_wanted =
            |gpu: &Device| wanted.as_ref().is_none_or(|wanted| wanted.iter().any(|name| is_named(gpu, name)));
        found.gpus = match self.library() {
            Err(why) => {
                found.gpu_fault.clone_from(why);
                Vec::new()
            }
            Ok(Some(nvml)) => {
                found.driver_version = nvml.sys_driver_version().unwrap_or_default();
                let cuda = nvml.sys_cuda_driver_version().ok();
                let version = |cuda: i32| format!("{}.{}", cuda / 1000, cuda % 1000 / 10);
                found.cuda_version = cuda.map(version).unwrap_or_default();
                let count = nvml.device_count().unwrap_or_else(|error| {
                    found.gpu_fault = refusal(&error, true).unwrap_or_default();
                    0
                });
                let wanted_of = |gpu: Device| {
                    // Whoever names a GPU that is divided has all of its parts.
                    let is_whole = is_wanted(&gpu);
                    let mut parts = parts(nvml, gpu);
                    parts.retain(|part| is_whole || is_wanted(part));
                    parts
                };
                (0..count).map(|index| ask(nvml, index)).flat_map(wanted_of).collect()
            }
            Ok(None) => {
                let whole = in_files(&self.root).into_iter().filter(is_wanted);
                whole.chain(named_parts(wanted.as_deref())).collect()
            }
        };
    }
}

/// Returns the parts of GPUs (MIG) that are named: the driver's files show whole GPUs alone, and
/// whoever names parts has them.
fn named_parts(wanted: Option<&[&str]>) -> Vec<Device> {
    let names = wanted.unwrap_or_default().iter().filter(|name| name.starts_with("MIG-"));
    let part = |(index, name): (u32, &&str)| Device {
        index: PARTS_FROM + index,
        uuid: (*name).to_owned(),
        ..Device::default()
    };
    (0..).zip(names.take(PARTS_NAMED_MAX)).map(part).collect()
}

/// Returns a GPU as what jobs can be given of it: itself, or its parts where it is divided (MIG).
/// The whole of it is then no device to CUDA.
fn parts(nvml: &Nvml, gpu: Device) -> Vec<Device> {
    let Ok(device) = nvml.device_by_index(gpu.index) else { return vec![gpu] };
    if !device.mig_mode().is_ok_and(|mode| mode.current == MIG_ENABLED) {
        return vec![gpu];
    }
    let places = 0..device.mig_device_count().unwrap_or(0).min(PARTS_FROM);
    let part = |place: u32| {
        // Most places are empty.
        let part = device.mig_device_by_index(place).ok()?;
        Some(Device {
            index: (gpu.index + 1) * PARTS_FROM + place,
            uuid: part.uuid().ok()?,
            model: part.name().unwrap_or_else(|_| gpu.model.clone()),
            memory_bytes: part.memory_info().map_or(0, |memory| memory.total),
            ..gpu.clone()
        })
    };
    let parts: Vec<Device> = places.filter_map(part).collect();
    if parts.is_empty() {
        let index = gpu.index;
        let fault = format!(
            "it is to be divided (MIG) and has no parts; make some (nvidia-smi mig -i {index} -cgi ... -C), or turn MIG off"
        );
        return vec![Device { fault: gpu.fault.clone().or(Some(fault)), ..gpu }];
    }
    parts
}

/// Returns what it means for the machine that the driver's library cannot be used; none if it means that there are no GPUs.
fn refusal(error: &NvmlError, has_driver: bool) -> Option<String> {
    let words = match error {
        NvmlError::LibloadingError(_) => return None,
        NvmlError::DriverNotLoaded | NvmlError::LibraryNotFound if !has_driver => return None,
        NvmlError::LibRmVersionMismatch => {
            "the NVIDIA driver and its library are of different versions; reboot the machine, or load the driver \
             again and restart the daemon"
        }
        NvmlError::NoPermission => {
            "the daemon may not use the NVIDIA driver; give its user access to /dev/nvidia*, and restart it"
        }
        other => {
            return Some(format!(
                "the NVIDIA driver refuses: {other}; look at nvidia-smi and dmesg, and restart the daemon then"
            ));
        }
    };
    Some(words.to_owned())
}

/// Returns whether a name of CUDA_VISIBLE_DEVICES is that of a GPU or of a part of one: its index,
/// its UUID, or the beginning of that.
fn is_named(gpu: &Device, name: &str) -> bool {
    let begins =
        |kind: &&str| name.len() > kind.len() && name.starts_with(kind) && gpu.uuid.starts_with(name);
    ["GPU-", "MIG-"].iter().any(begins) || name == gpu.index.to_string()
}

/// What the driver says of one GPU. One that it cannot speak to is there all the same, and is given to no rank: the others
/// keep their indices.
fn ask(nvml: &Nvml, index: u32) -> Device {
    let lost = |error: NvmlError| Device {
        index,
        fault: Some(format!("the driver cannot speak to it: {error}; reset it, or reboot the machine")),
        ..Device::default()
    };
    let device = match nvml.device_by_index(index) {
        Ok(device) => device,
        Err(error) => return lost(error),
    };
    let memory = match device.memory_info() {
        Ok(memory) => memory.total,
        Err(error @ (NvmlError::GpuLost | NvmlError::Unknown)) => return lost(error),
        // An older driver, or a GPU that shares the memory of the host.
        Err(_) => 0,
    };
    // Those since the driver was loaded: a reset begins anew. GPUs without ECC cannot tell.
    let errors = device.total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile).unwrap_or(0);
    let fault = (errors > 0).then(|| {
        format!("{errors} memory errors that could not be corrected; reset it (nvidia-smi -r -i {index})")
    });
    Device {
        index,
        uuid: device.uuid().unwrap_or_default(),
        model: device.name().unwrap_or_default(),
        memory_bytes: memory,
        pci_address: device.pci_info().map(|place| pci::normal(&place.bus_id)).unwrap_or_default(),
        numa_node: None,
        near_fabric: Vec::new(),
        fault,
    }
}

/// NVIDIA's driver shows one directory per GPU, named by its place on the bus. Their order is the index: that of
/// nvidia-smi and of CUDA_DEVICE_ORDER=PCI_BUS_ID, also in a container that shows only some GPUs, where the device
/// minor is not.
fn in_files(root: &Path) -> Vec<Device> {
    let Ok(entries) = fs::read_dir(root.join("proc/driver/nvidia/gpus")) else { return Vec::new() };
    let mut places: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    places.sort();
    let read = |place: &PathBuf| {
        let text = fs::read_to_string(place.join("information")).ok()?;
        Some((place.file_name()?.to_str()?.to_owned(), text))
    };
    let texts = places.iter().filter_map(read);
    (0..)
        .zip(texts)
        .map(|(index, (address, text))| {
            let field = |name: &str| {
                let line = text.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_prefix(':'));
                line.map(|value| value.trim().to_owned()).unwrap_or_default()
            };
            // The driver's files do not tell the memory.
            let (uuid, model) = (field("GPU UUID"), field("Model"));
            Device { index, uuid, model, pci_address: address, ..Device::default() }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_that_refuses_is_a_fault_and_one_that_is_not_there_is_none() {
        let words = |error: &NvmlError, has_driver| refusal(error, has_driver).unwrap_or_default();
        assert!(words(&NvmlError::LibRmVersionMismatch, true).contains("different versions; reboot"));
        assert!(words(&NvmlError::NoPermission, true).contains("access to /dev/nvidia*"));
        assert!(words(&NvmlError::DriverNotLoaded, true).contains("the NVIDIA driver refuses"));
        assert_eq!(
            words(&NvmlError::DriverNotLoaded, false),
            "",
            "a machine without GPUs has the library as well"
        );
    }

    #[test]
    fn visible_gpus_are_named_as_cuda_names_them() {
        let gpu = Device { index: 3, uuid: "GPU-8932f937-d72c".to_owned(), ..Device::default() };
        let table = [
            ("3", true),
            ("GPU-8932f937-d72c", true),
            ("GPU-8932", true),
            ("GPU-", false),
            ("", false),
            ("33", false),
            ("GPU-9", false),
            ("MIG-8932f937-d72c", false),
            ("MIG-GPU-8932f937-d72c/1/0", false),
        ];
        for (name, expected) in table {
            assert_eq!(is_named(&gpu, name), expected, "{name}");
        }
    }

    /// As a container shows them that was given the upper GPUs of its machine.
    fn fake_gpus(count: u32) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for i in 0..count {
            let minor = i + 4;
            let text = format!("Model: \t\t NVIDIA H100\nGPU UUID: \t GPU-{i}\nDevice Minor: \t {minor}\n");
            let dir = root.path().join(format!("proc/driver/nvidia/gpus/0000:{i}a:00.0"));
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join("information"), text).unwrap();
        }
        root
    }

    #[test]
    fn gpus_are_those_the_driver_shows_and_the_daemon_may_see() {
        let root = fake_gpus(4);
        let seen = |visible: Option<&str>| {
            let (root, visible) = (root.path().to_owned(), visible.map(ToOwned::to_owned));
            let mut found = Inventory::default();
            Gpus { root, visible, library: OnceLock::from(Ok(None)) }.discover(&mut found);
            found.gpus
        };
        let indices = |visible| seen(visible).iter().map(|gpu| gpu.index).collect::<Vec<_>>();
        assert_eq!(indices(None), [0, 1, 2, 3]);
        assert_eq!(indices(Some("2,GPU-0")), [0, 2]);
        assert_eq!(indices(Some("")), [0; 0]);
        assert_eq!(indices(Some("MIG-a,MIG-b,1")), [1, 100, 101], "parts are taken as they are named");
        let second = &seen(None)[1];
        assert_eq!((second.model.as_str(), second.pci_address.as_str()), ("NVIDIA H100", "0000:1a:00.0"));
    }
}
