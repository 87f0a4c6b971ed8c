//! A timer on CLOCK_BOOTTIME: it fires at once when a machine wakes up after its time.

#![expect(unsafe_code, reason = "tokio leaves it to the caller that a descriptor stays open")]

use std::io;
use std::os::fd::OwnedFd;

use muster_core::types::Millis;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::unix::AsyncFd;

#[derive(Debug)]
pub(crate) struct Timer(AsyncFd<OwnedFd>);

impl Timer {
    /// Must be called within a runtime.
    pub fn new() -> io::Result<Self> {
        let timer = timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        // SAFETY: the descriptor is owned, so it stays open and the same for as long as it is registered.
        unsafe { Ok(Self(AsyncFd::register(timer)?)) }
    }

    /// Returns at this time, or never without one.
    pub async fn at(&mut self, time: Option<Millis>) -> io::Result<()> {
        let Some(time) = time else { return std::future::pending().await };
        // Zero would disarm it. What lies further off than the clock can say does not come.
        let millis = time.0.clamp(1, i64::MAX as u64 / 1_000_000);
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let value = Timespec { tv_sec: (millis / 1000) as i64, tv_nsec: (millis % 1000 * 1_000_000) as i64 };
        timerfd_settime(
            &self.0,
            TimerfdTimerFlags::ABSTIME,
            &Itimerspec { it_interval: zero, it_value: value },
        )?;
        loop {
            let mut ready = self.0.readable().await?;
            let mut count = [0; 8];
            match ready.try_io(|timer| Ok(rustix::io::read(timer, &mut count)?)) {
                Ok(read) => return read.map(drop),
                Err(_not_yet) => {}
            }
        }
    }
}
