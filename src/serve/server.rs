//! Connections: a limited number at a time, a time limit for each request's head, and a graceful shutdown.

use super::router::router;
use super::state::App;
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

/// Most bytes of a request's head.
const MAX_HEAD_BYTES: usize = 64 << 10;
/// Pause if the system cannot accept a connection, usually because there are no file descriptors left.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves `app` on all of `listeners` until `shutdown` completes. Then no more connections are accepted, requests in
/// progress get [`grace_seconds`](super::ServerOptions::grace_seconds), and the remaining ones are cut off.
///
/// # Errors
/// Returns no error now: a failed connection concerns its client only.
pub async fn serve(
    listeners: Vec<TcpListener>,
    app: App,
    shutdown: impl Future<Output = ()>,
) -> std::io::Result<()> {
    let options = app.0.options.clone();
    let service = TowerToHyperService::new(router(&app.0));
    let mut http = http1::Builder::new();
    let head = Duration::from_secs_f64(options.header_seconds);
    http.timer(TokioTimer::new()).header_read_timeout(head).max_buf_size(MAX_HEAD_BYTES);
    let places = Arc::new(Semaphore::new(options.max_connections.max(1)));
    let (end, ending) = watch::channel(false);
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        let accepted = async {
            let place = places.clone().acquire_owned().await;
            (accept(&listeners).await, place)
        };
        let (accepted, place) = tokio::select! {
            accepted = accepted => accepted,
            () = &mut shutdown => break,
        };
        while connections.try_join_next().is_some() {}
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        // The pieces of a stream should be sent at once. If this option cannot be set, they are sent a little later.
        let _ = stream.set_nodelay(true);
        let (http, service, ending) = (http.clone(), service.clone(), ending.clone());
        let tls = app.0.tls.clone();
        // A client that disconnects or is too slow ends its connection. No one else needs to know.
        connections.spawn(async move {
            let _place = place;
            let Some(tls) = tls else { return answer(&http, stream, service, ending).await };
            if let Ok(Ok(stream)) = tokio::time::timeout(head, tls.accept(stream)).await {
                answer(&http, stream, service, ending).await;
            }
        });
    }
    drop(listeners);
    app.end();
    let grace = Duration::from_secs_f64(options.grace_seconds);
    let _ = end.send(true);
    let _ = tokio::time::timeout(grace, async { while connections.join_next().await.is_some() {} }).await;
    connections.shutdown().await;
    Ok(())
}

/// Answers the requests of a connection; once the server ends, the one in progress only.
async fn answer(
    http: &http1::Builder,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    service: TowerToHyperService<Router>,
    mut ending: watch::Receiver<bool>,
) {
    let mut connection = pin!(http.serve_connection(TokioIo::new(stream), service).with_upgrades());
    tokio::select! {
        _ = connection.as_mut() => return,
        _ = ending.wait_for(|ending| *ending) => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = connection.await;
}

/// The next connection of any listener.
async fn accept(listeners: &[TcpListener]) -> std::io::Result<(TcpStream, SocketAddr)> {
    poll_fn(|context| {
        let ready = listeners.iter().find_map(|listener| match listener.poll_accept(context) {
            Poll::Ready(accepted) => Some(accepted),
            Poll::Pending => None,
        });
        ready.map_or(Poll::Pending, Poll::Ready)
    })
    .await
}

#[cfg(test)]
mod tests;
