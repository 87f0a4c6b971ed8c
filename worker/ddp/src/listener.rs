//! Waiting for rank 0 to listen.

use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

/// Longest wait for one answer.
const CONNECT_MAX: Duration = Duration::from_secs(2);
/// Time between attempts.
const INTERVAL: Duration = Duration::from_millis(5);

/// Waits until somebody listens at the master's address, for at most `timeout`, and gives what is left of it.
/// What is wrong if nobody does is libtorch's to say.
///
/// libtorch's own client waits half a second and more between attempts, so a rank that is a moment too early
/// would lose that much.
pub fn wait(master_addr: &str, master_port: u16, timeout: Duration) -> Duration {
    let began = now();
    while began.elapsed() < timeout {
        let Ok(addresses) = (master_addr, master_port).to_socket_addrs() else { break };
        let mut listening = addresses.map(|address| TcpStream::connect_timeout(&address, CONNECT_MAX));
        if listening.any(|connected| connected.is_ok()) {
            break;
        }
        std::thread::sleep(INTERVAL);
    }
    // Never nothing: libtorch takes a timeout of zero for none at all.
    timeout.saturating_sub(began.elapsed()).max(Duration::from_millis(100))
}

#[expect(clippy::disallowed_methods, reason = "a training program is its own driver")]
fn now() -> Instant {
    Instant::now()
}
