//! What one SSH connection may do: log in with the one key, run commands, use SFTP.

use std::collections::HashMap;
use std::sync::Arc;

use russh::keys::{PublicKey, ssh_key::public::KeyData};
use russh::server::{Auth, ChannelOpenHandle, Handler, Msg, PublicKeyOffer, Session, VerifiedPublicKey};
use russh::{Channel, ChannelId, Pty};
use tokio::sync::{oneshot, watch};

use super::command::{self, Shell};
use super::sftp;

/// The only user of an instance.
pub(super) const USER: &str = "outliers";

/// One connection.
pub(super) struct Connection {
    shell: Arc<Shell>,
    authorized: Arc<PublicKey>,
    /// Told when the client has logged in.
    known: Option<oneshot::Sender<()>>,
    /// Open channels on which nothing runs yet.
    idle: HashMap<ChannelId, Channel<Msg>>,
    /// Dropped when the client closes the channel, or with the connection: whoever serves the channel lets go of it.
    open: HashMap<ChannelId, watch::Sender<()>>,
}

impl Connection {
    /// A connection that lets `authorized` in, tells `known` so, and runs commands by `shell`.
    pub(super) fn new(shell: Arc<Shell>, authorized: Arc<PublicKey>, known: oneshot::Sender<()>) -> Self {
        Self { shell, authorized, known: Some(known), idle: HashMap::new(), open: HashMap::new() }
    }

    fn judge(&self, user: &str, key: &KeyData) -> Auth {
        if user == USER && key == self.authorized.key_data() { Auth::Accept } else { Auth::reject() }
    }

    /// The channel and the sign of its end, once: a channel serves one request.
    fn take(&mut self, id: ChannelId) -> Option<(Channel<Msg>, watch::Receiver<()>)> {
        let channel = self.idle.remove(&id)?;
        let (sender, receiver) = watch::channel(());
        self.open.insert(id, sender);
        Some((channel, receiver))
    }

    fn run(&mut self, id: ChannelId, command: Option<&[u8]>, session: &mut Session) -> Result<(), russh::Error> {
        let Some((channel, closed)) = self.take(id) else { return session.channel_failure(id) };
        match self.shell.start(command) {
            Ok(running) => {
                session.channel_success(id)?;
                tokio::spawn(command::serve(running, channel, session.handle(), closed));
                Ok(())
            }
            Err(error) => {
                tracing::warn!(%error, "a command could not be started");
                session.channel_failure(id)
            }
        }
    }
}

impl Handler for Connection {
    type Error = russh::Error;

    async fn auth_publickey_offered(&mut self, user: &str, offer: PublicKeyOffer<'_>) -> Result<Auth, Self::Error> {
        Ok(self.judge(user, offer.public_key.key_data()))
    }

    async fn auth_publickey(&mut self, user: &str, key: VerifiedPublicKey<'_>) -> Result<Auth, Self::Error> {
        Ok(self.judge(user, key.public_key.key_data()))
    }

    async fn auth_succeeded(&mut self, _session: &mut Session) -> Result<(), Self::Error> {
        if let Some(known) = self.known.take() {
            // Whoever waited for it has hung up at the same moment.
            let _ = known.send(());
        }
        Ok(())
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _session: &mut Session,
    ) -> Result<(), Self::Error> {
        self.idle.insert(channel.id(), channel);
        reply.accept().await;
        Ok(())
    }

    async fn channel_close(&mut self, id: ChannelId, _session: &mut Session) -> Result<(), Self::Error> {
        self.idle.remove(&id);
        self.open.remove(&id);
        Ok(())
    }

    async fn exec_request(&mut self, id: ChannelId, data: &[u8], session: &mut Session) -> Result<(), Self::Error> {
        self.run(id, Some(data), session)
    }

    async fn shell_request(&mut self, id: ChannelId, session: &mut Session) -> Result<(), Self::Error> {
        self.run(id, None, session)
    }

    async fn subsystem_request(&mut self, id: ChannelId, name: &str, session: &mut Session) -> Result<(), Self::Error> {
        if name != "sftp" {
            return session.channel_failure(id);
        }
        let Some((channel, closed)) = self.take(id) else { return session.channel_failure(id) };
        session.channel_success(id)?;
        tokio::spawn(sftp::serve(self.shell.home.clone(), channel, closed));
        Ok(())
    }

    async fn pty_request(
        &mut self,
        id: ChannelId,
        _term: &str,
        _columns: u32,
        _rows: u32,
        _width: u32,
        _height: u32,
        _modes: &[(Pty, u32)],
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        session.channel_failure(id)
    }

    async fn env_request(
        &mut self,
        id: ChannelId,
        _name: &str,
        _value: &str,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        session.channel_failure(id)
    }

    async fn x11_request(
        &mut self,
        id: ChannelId,
        _single: bool,
        _protocol: &str,
        _cookie: &str,
        _screen: u32,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        session.channel_failure(id)
    }
}
