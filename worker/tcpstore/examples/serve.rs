//! A store on a port of loopback, or of the address given, until its standard input ends: for benches, and to try it
//! out. The first line it prints says where it listens.

use std::error::Error;
use std::io::Read;
use std::net::SocketAddr;

use muster_tcpstore::{Limits, Server};

fn main() -> Result<(), Box<dyn Error>> {
    let address: SocketAddr = std::env::args().nth(1).as_deref().unwrap_or("127.0.0.1:0").parse()?;
    let store = Server::bind(address, Limits::default())?.start()?;
    println!("{}", store.address());
    std::io::stdin().read_to_end(&mut Vec::new())?;
    for client in store.observe().clients {
        eprintln!("{client}");
    }
    Ok(())
}
