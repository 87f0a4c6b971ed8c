//! The process group: who takes part, and the collectives between them.

use crate::env::{self, Launch};
use crate::error::{During, Error, Operation};
use crate::listener;
use crate::memory;
use crate::sampler::Share;
use c10d_sys::{Device, Group, ReduceOp, Store};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tch::{Kind, Tensor};

/// Groups made in this process so far: each has keys of its own, so that a group rebuilt after a failure
/// never reads the addresses of the one before it.
static GROUPS: AtomicU64 = AtomicU64::new(0);

/// The ranks that train together, connected to one another over Gloo.
///
/// Every method that talks is a collective: all ranks call the same ones in the same order. Each returns
/// within the timeout. Dropping the group closes its connections, which the peers notice at once.
#[derive(Debug)]
pub struct ProcessGroup {
    // Before the store: fields drop in order, and the group still holds connections made through it.
    pub(crate) inner: Group,
    // Rank 0 may host it; it has to outlive the rendezvous of a slower rank.
    _store: Store,
    rank: usize,
    world_size: usize,
    local_rank: usize,
    timeout: Duration,
}

impl ProcessGroup {
    /// Joins the group that the launcher describes in the environment; blocks until every rank has.
    ///
    /// Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as `muster` and `torchrun` set
    /// them. With `TORCHELASTIC_USE_AGENT_STORE=True` the launcher hosts the store and every rank is a
    /// client; otherwise rank 0 hosts it. Where none of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT is
    /// set there was no launcher, and the group is [`ProcessGroup::single`]; where only some are, it is
    /// an error that names the missing one.
    ///
    /// MUSTER_TIMEOUT_SECONDS bounds every wait, here and in every later collective (default 600).
    ///
    /// Ranks listen on the interface that GLOO_SOCKET_IFNAME names, else on loopback if MASTER_ADDR is,
    /// else on the address from which this machine reaches MASTER_ADDR.
    pub fn from_env() -> Result<Self, Error> {
        memory::keep_freed_blocks();
        let lookup = |name: &str| std::env::var(name).ok();
        let timeout = env::timeout(&lookup)?;
        match env::launch(&lookup)? {
            Some(launch) => Self::connect(&launch, timeout),
            None => Self::single_with(timeout),
        }
    }

    /// A group of one, without a network: the same program, stand-alone.
    pub fn single() -> Result<Self, Error> {
        Self::single_with(env::TIMEOUT_DEFAULT)
    }

    fn single_with(timeout: Duration) -> Result<Self, Error> {
        let store = Store::in_process(timeout).during(Operation::Rendezvous)?;
        let loopback = Device::Hostname("127.0.0.1".to_owned());
        let inner = Group::new(&store, 0, 1, &loopback, timeout).during(Operation::Connect)?;
        Ok(Self { inner, _store: store, rank: 0, world_size: 1, local_rank: 0, timeout })
    }

    fn connect(launch: &Launch, timeout: Duration) -> Result<Self, Error> {
        let device = match &launch.interface {
            Some(name) => Device::Interface(name.clone()),
            None => {
                Device::Hostname(env::address_towards(&launch.master_addr, launch.master_port)?.to_string())
            }
        };
        let (host, port) = (&launch.master_addr, launch.master_port);
        let store = if launch.rank == 0 && !launch.agent_store {
            Store::tcp_server(host, port, launch.world_size, timeout)
        } else {
            let left = listener::wait(host, port, timeout);
            Store::tcp_client(host, port, launch.world_size, left)
        }
        .during(Operation::Rendezvous)?;
        let nth = GROUPS.fetch_add(1, Ordering::Relaxed);
        // Not by TORCHELASTIC_RESTART_COUNT: torchrun's nodes may disagree on it.
        let gang = launch.gang.as_deref().unwrap_or("any");
        let keys =
            store.with_prefix(&format!("muster_ddp/{gang}/group_{nth}")).during(Operation::Rendezvous)?;
        let (rank, size) = (launch.rank as i32, launch.world_size as i32);
        let inner = Group::new(&keys, rank, size, &device, timeout).during(Operation::Connect)?;
        Ok(Self {
            inner,
            _store: store,
            rank: launch.rank,
            world_size: launch.world_size,
            local_rank: launch.local_rank,
            timeout,
        })
    }

    /// This process's number, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of processes.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// This process's number on its machine, from 0.
    pub fn local_rank(&self) -> usize {
        self.local_rank
    }

    /// How long any collective may take.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Whether this is rank 0, which prints and saves.
    pub fn is_first(&self) -> bool {
        self.rank == 0
    }

    /// This rank's share of the data, for a [`crate::DistributedSampler`].
    pub fn share(&self) -> Share {
        Share { rank: self.rank, world_size: self.world_size }
    }

    /// Combines a CPU tensor over all ranks, in place. Shapes and kinds must agree.
    pub fn all_reduce(&self, tensor: &mut Tensor, op: ReduceOp) -> Result<(), Error> {
        in_place(tensor, |dense| self.inner.all_reduce(dense, op)).during(Operation::AllReduce)
    }

    /// Combines a few numbers over all ranks: the sums that metrics are made of.
    pub fn all_reduce_values<const N: usize>(
        &self,
        values: [f64; N],
        op: ReduceOp,
    ) -> Result<[f64; N], Error> {
        let mut tensor = Tensor::from_slice(&values);
        self.all_reduce(&mut tensor, op)?;
        let mut reduced = [0.0; N];
        tensor.copy_data(&mut reduced, N);
        Ok(reduced)
    }

    /// Overwrites a CPU tensor with that of rank `root`.
    pub fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<(), Error> {
        in_place(tensor, |dense| self.inner.broadcast(dense, root as i32)).during(Operation::Broadcast)
    }

    /// Every rank's tensor, in rank order. Shapes and kinds must agree.
    pub fn all_gather(&self, tensor: &Tensor) -> Result<Vec<Tensor>, Error> {
        let mine = tensor.detach().contiguous();
        let mut all: Vec<Tensor> = (0..self.world_size).map(|_| mine.empty_like()).collect();
        self.inner.all_gather(&mut all, &mine).during(Operation::AllGather)?;
        Ok(all)
    }

    /// Waits until every rank has come here.
    pub fn barrier(&self) -> Result<(), Error> {
        self.inner.barrier().during(Operation::Barrier)
    }

    /// Every rank's number, in rank order.
    pub(crate) fn gather_number(&self, number: i64) -> Result<Vec<i64>, Error> {
        let all = self.all_gather(&Tensor::from_slice(&[number]).to_kind(Kind::Int64))?;
        Ok(all.iter().map(|tensor| tensor.int64_value(&[0])).collect())
    }
}

/// Gloo takes the memory of a tensor for dense, without a look: a view with gaps goes through a copy.
fn in_place<E>(tensor: &mut Tensor, collective: impl FnOnce(&mut Tensor) -> Result<(), E>) -> Result<(), E> {
    if tensor.is_contiguous() {
        return collective(tensor);
    }
    let mut dense = tensor.detach().contiguous();
    collective(&mut dense)?;
    tensor.detach().copy_(&dense);
    Ok(())
}
