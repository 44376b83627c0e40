//! An ordinary client: another implementation of the protocol, which obeys the rules.

use std::net::SocketAddr;

use ::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use futures_util::{SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{Error, Message, client::IntoClientRequest, protocol::CloseFrame},
};

use super::soon;

/// A client after `101`.
pub struct Client {
    /// The connection.
    pub stream: WebSocketStream<TcpStream>,
    /// The headers of `101`.
    pub headers: HeaderMap,
}

impl Client {
    /// A handshake; a refusal is its status.
    pub async fn connect(
        address: SocketAddr,
        path: &str,
        headers: &[(&str, String)],
    ) -> Result<Self, StatusCode> {
        let mut request = format!("ws://{address}{path}").into_client_request().unwrap();
        for (name, value) in headers {
            let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
            request.headers_mut().append(name, HeaderValue::from_str(value).unwrap());
        }
        let socket = TcpStream::connect(address).await.unwrap();
        socket.set_nodelay(true).unwrap();
        match soon("the handshake", client_async(request, socket)).await {
            Ok((stream, response)) => Ok(Self { stream, headers: response.into_parts().0.headers }),
            Err(Error::Http(response)) => Err(response.status()),
            Err(error) => panic!("{error}"),
        }
    }

    /// Sends a text message.
    pub async fn send(&mut self, text: impl Into<String>) {
        self.stream.send(Message::text(text.into())).await.unwrap();
    }

    /// Sends any message.
    pub async fn send_message(&mut self, message: Message) {
        self.stream.send(message).await.unwrap();
    }

    /// The next message of any kind.
    #[track_caller]
    pub fn next(&mut self) -> impl Future<Output = Message> {
        let next = soon("a message for the client", self.stream.next());
        async move { next.await.expect("the connection lives").expect("the connection lives") }
    }

    /// The next message, which must be text; pings are skipped.
    #[track_caller]
    pub fn text(&mut self) -> impl Future<Output = String> {
        let caller = std::panic::Location::caller();
        async move {
            loop {
                match self.next().await {
                    Message::Text(text) => return text.to_string(),
                    Message::Ping(_) => {}
                    other => panic!("{caller}: no text: {other:?}"),
                }
            }
        }
    }

    /// The next message, which must be JSON.
    #[track_caller]
    pub fn json(&mut self) -> impl Future<Output = serde_json::Value> {
        let text = self.text();
        async move { serde_json::from_str(&text.await).unwrap() }
    }

    /// Reads up to the close frame: its code and reason. Data before it is an error.
    pub async fn closed(&mut self) -> (u16, String) {
        soon("a close frame", self.read_closed()).await
    }

    async fn read_closed(&mut self) -> (u16, String) {
        loop {
            match self.next().await {
                Message::Close(Some(CloseFrame { code, reason })) => {
                    let end = soon("the end of the stream", self.stream.next()).await;
                    assert!(end.is_none(), "{end:?}");
                    return (code.into(), reason.to_string());
                }
                Message::Ping(_) | Message::Pong(_) => {}
                other => panic!("no close frame: {other:?}"),
            }
        }
    }

    /// Closes politely, and waits for the answer.
    pub async fn close(mut self) {
        self.stream.close(None).await.unwrap();
        while soon("the answer to a close frame", self.stream.next()).await.is_some() {}
    }
}
