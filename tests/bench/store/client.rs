//! A client of a store in as few lines as it takes, so that what is measured is the server.

use std::io::{BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

const MAGIC: u32 = 0x3C85_F7CE;
/// Far above any answer; a bench that hangs ends.
const PATIENCE: Duration = Duration::from_mins(1);

pub(crate) struct Client {
    stream: BufReader<TcpStream>,
    request: Vec<u8>,
}

impl Client {
    /// Connects as torch's clients do: the validation, a ping, and then it counts itself.
    pub(crate) fn join(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut client = Self { stream: BufReader::new(stream), request: Vec::new() };
        client.request.push(0);
        client.request.extend(MAGIC.to_le_bytes());
        client.send();
        client.request.push(13);
        client.request.extend(7_u32.to_le_bytes());
        client.send();
        assert_eq!(client.read(), 7_u32.to_le_bytes());
        client.add("init/", 1);
        client
    }

    pub(crate) fn set(&mut self, key: &str, value: &[u8]) {
        self.request.push(1);
        self.bytes(key.as_bytes());
        self.bytes(value);
        self.send();
    }

    /// As torch's clients read a value: they wait for it first.
    pub(crate) fn get(&mut self, key: &str) -> Vec<u8> {
        self.wait(key);
        self.request.push(3);
        self.bytes(key.as_bytes());
        self.send();
        let length = u64::from_le_bytes(self.read());
        let mut value = vec![0; usize::try_from(length).unwrap()];
        self.stream.read_exact(&mut value).unwrap();
        value
    }

    pub(crate) fn wait(&mut self, key: &str) {
        self.request.push(6);
        self.request.extend(1_u64.to_le_bytes());
        self.bytes(key.as_bytes());
        self.send();
        assert_eq!(self.read(), [0]);
    }

    pub(crate) fn add(&mut self, key: &str, amount: i64) -> i64 {
        self.request.push(4);
        self.bytes(key.as_bytes());
        self.request.extend(amount.to_le_bytes());
        self.send();
        i64::from_le_bytes(self.read())
    }

    /// As torch builds a barrier on a store: the last to come sets what the others wait for.
    pub(crate) fn barrier(&mut self, name: &str, size: usize) {
        let last = format!("{name}/last");
        if self.add(name, 1) == i64::try_from(size).unwrap() {
            self.set(&last, b"1");
        }
        self.wait(&last);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.request.extend((bytes.len() as u64).to_le_bytes());
        self.request.extend_from_slice(bytes);
    }

    fn send(&mut self) {
        self.stream.get_mut().write_all(&self.request).unwrap();
        self.request.clear();
    }

    fn read<const LENGTH: usize>(&mut self) -> [u8; LENGTH] {
        let mut bytes = [0; LENGTH];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }
}
