//! Connections from the host to ports of the guest's loopback, for port-forward.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hyper_protocol::rpc::agent::ConnectPortRequest;
use tokio::io::copy_bidirectional;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::error::AgentError;
use crate::streams::Streams;

/// Most connections at a time.
const MAX_CONNECTIONS: usize = 256;
/// How long a listener whose queue is full is waited for.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What is connected.
#[derive(Debug)]
pub(crate) struct Loopback {
    room: Arc<Semaphore>,
}

impl Default for Loopback {
    fn default() -> Self {
        Self { room: Arc::new(Semaphore::new(MAX_CONNECTIONS)) }
    }
}

impl Loopback {
    /// Connects a stream with a port; returns when bytes can flow.
    ///
    /// # Errors
    /// It is no port, nobody listens there, the stream does not come, or there are too many.
    pub(crate) async fn connect(
        &self,
        streams: &Streams,
        request: &ConnectPortRequest,
    ) -> Result<(), AgentError> {
        let (server, permit) = self.dial(request.port).await?;
        let mut stream = streams.claim(request.stream).await?;
        tokio::spawn(async move {
            let mut server = server;
            // Whichever side breaks it off, both are closed after this.
            let _ = copy_bidirectional(&mut stream, &mut server).await;
            drop(permit);
        });
        Ok(())
    }

    async fn dial(&self, port: u32) -> Result<(TcpStream, OwnedSemaphorePermit), AgentError> {
        let port = u16::try_from(port).ok().filter(|port| *port != 0);
        let port = port.ok_or_else(|| AgentError::invalid("a port is a number from 1 to 65535"))?;
        let permit = Arc::clone(&self.room).try_acquire_owned();
        let permit =
            permit.map_err(|_| AgentError::limit("connections to ports at a time", MAX_CONNECTIONS))?;
        let places: [SocketAddr; 2] =
            [(Ipv4Addr::LOCALHOST, port).into(), (Ipv6Addr::LOCALHOST, port).into()];
        for place in places {
            if let Ok(Ok(server)) = timeout(CONNECT_TIMEOUT, TcpStream::connect(place)).await {
                return Ok((server, permit));
            }
        }
        Err(AgentError::state(format!("nobody listens on port {port} of the pod's loopback")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[tokio::test]
    async fn listeners_are_found_on_both_addresses() {
        let loopback = Loopback::default();
        for place in ["127.0.0.1:0", "[::1]:0"] {
            // A host without IPv6 has but one of them.
            let Ok(listener) = tokio::net::TcpListener::bind(place).await else { continue };
            let port = listener.local_addr().unwrap().port();
            let (server, _permit) = loopback.dial(port.into()).await.unwrap();
            assert_eq!(server.peer_addr().unwrap().port(), port);
        }
    }

    #[tokio::test]
    async fn what_is_no_port_or_too_many_is_refused() {
        let loopback = Loopback::default();
        for port in [0, 65_536, u32::MAX] {
            assert_eq!(loopback.dial(port).await.unwrap_err().kind(), ErrorKind::Invalid, "{port}");
        }
        let all = Arc::clone(&loopback.room).try_acquire_many_owned(u32::try_from(MAX_CONNECTIONS).unwrap());
        assert_eq!(loopback.dial(9).await.unwrap_err().kind(), ErrorKind::Limit);
        drop(all);
        let port = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        assert_eq!(loopback.dial(port.into()).await.unwrap_err().kind(), ErrorKind::State);
    }
}
