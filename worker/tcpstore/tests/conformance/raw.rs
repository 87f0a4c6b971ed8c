//! A client that says exactly what it is told to.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use muster_tcpstore::{Key, MAGIC, Request};

/// Far above what an answer takes on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(30);

pub struct Raw(pub TcpStream);

impl Raw {
    /// Connects and says nothing.
    pub fn silent(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(stream)
    }

    /// As torch's clients connect.
    pub fn connect(address: SocketAddr) -> Self {
        let mut raw = Self::silent(address);
        raw.send(&[Request::Validate(MAGIC), Request::Ping(std::process::id())]);
        assert_eq!(raw.read(4), std::process::id().to_le_bytes());
        raw
    }

    pub fn send(&mut self, requests: &[Request]) {
        let mut bytes = Vec::new();
        for request in requests {
            request.encode(&mut bytes);
        }
        self.0.write_all(&bytes).unwrap();
    }

    pub fn read(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// A value or a key behind its length.
    pub fn value(&mut self) -> Vec<u8> {
        let length = u64::from_le_bytes(self.read(8).try_into().unwrap());
        self.read(usize::try_from(length).unwrap())
    }

    pub fn number(&mut self) -> i64 {
        i64::from_le_bytes(self.read(8).try_into().unwrap())
    }

    /// Whether the server has closed the connection, with or without bytes of ours unread.
    pub fn is_closed(&mut self) -> bool {
        match self.0.read(&mut [0]) {
            Ok(length) => length == 0,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

pub fn key(text: &str) -> Key {
    Key::from(text.as_bytes())
}
