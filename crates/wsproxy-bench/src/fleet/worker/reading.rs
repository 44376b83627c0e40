//! Bytes that clients of a thread receive: decrypted, counted and answered.

use rustix::io::Errno;
use rustix::net::RecvFlags;

use wsproxy_proto::ws::frame::Opcode;

use super::{Worker, describe};
use crate::clock::now_ns;
use crate::fleet::Tally;
use crate::fleet::client::Phase;
use crate::frame::{self, Content, Event, Notice};
use crate::handshake::{self, Answer};
use crate::stamp::{CallStamp, Stamp};

impl Worker {
    /// Takes the bytes of one system call; `None` when no more follow.
    pub(super) fn read(&mut self, slot: u32, buffer: &mut [u8]) -> Option<usize> {
        let client = &mut self.clients[slot as usize];
        let socket = client.socket.as_ref()?;
        let reason = match rustix::net::recv(socket, &mut *buffer, RecvFlags::empty()) {
            Ok((_, read)) if read > 0 => {
                if client.secure.is_some() {
                    self.read_encrypted(slot, &buffer[..read]);
                } else {
                    self.read_plain(slot, &buffer[..read]);
                }
                return Some(read);
            }
            Ok(_) => "closed without a word",
            Err(Errno::AGAIN) => return None,
            Err(error) => describe(error),
        };
        self.end(slot, reason);
        None
    }

    fn read_encrypted(&mut self, slot: u32, encrypted: &[u8]) {
        let mut plain = std::mem::take(&mut self.plain);
        plain.clear();
        let client = &mut self.clients[slot as usize];
        let Some(secure) = &mut client.secure else { return };
        let read = secure.read(encrypted, &mut plain);
        let answer = secure.outgoing();
        if !answer.is_empty() {
            let was_empty = client.unsent.is_empty();
            if client.send_as_is(&answer) == Ok(false) && was_empty {
                self.set_interest(slot, false);
            }
        }
        if !plain.is_empty() {
            self.read_plain(slot, &plain);
        }
        self.plain = plain;
        if read.is_err() {
            self.end(slot, "broken TLS");
        }
    }

    fn read_plain(&mut self, slot: u32, input: &[u8]) {
        match self.clients[slot as usize].phase {
            Phase::Handshake => self.read_answer(slot, input),
            _ => self.read_frames(slot, input),
        }
    }

    fn read_answer(&mut self, slot: u32, input: &[u8]) {
        let client = &mut self.clients[slot as usize];
        client.head.extend_from_slice(input);
        match handshake::answer(&client.head) {
            Answer::Incomplete => {}
            Answer::Accepted(head) => {
                let rest = client.head.split_off(head);
                client.head = Vec::new();
                client.phase = Phase::Open;
                let took_ns = now_ns().saturating_sub(client.started_ns);
                self.tally.handshake.saturating_record(took_ns);
                self.round.opened += 1;
                self.in_flight -= 1;
                if !rest.is_empty() {
                    self.read_frames(slot, &rest);
                }
            }
            Answer::Refused(status) => self.fail(slot, &format!("status {status}")),
            Answer::Malformed => self.fail(slot, "malformed answer"),
        }
    }

    fn read_frames(&mut self, slot: u32, mut input: &[u8]) {
        let now = now_ns();
        loop {
            let client = &mut self.clients[slot as usize];
            match client.reader.next(&mut input) {
                Ok(None) => return,
                Ok(Some(Event::Message { content: Content::Stamped(stamp, position), bytes })) => {
                    client.position = position.or(client.position);
                    self.tally.bytes += bytes;
                    self.take(slot, stamp, now);
                }
                Ok(Some(Event::Message { content: Content::Call(call), bytes })) => {
                    self.tally.bytes += bytes;
                    self.answer(slot, call);
                }
                Ok(Some(Event::Message { content: Content::Notice(notice), .. })) => {
                    self.take_notice(slot, notice);
                }
                Ok(Some(Event::Ping)) => {
                    let mut pong = Vec::with_capacity(132);
                    let payload = client.reader.control_payload();
                    frame::push_client_frame(Opcode::Pong, payload, &mut pong);
                    self.tally.pings += 1;
                    self.send(slot, &pong);
                }
                Ok(Some(Event::Pong)) => {}
                Ok(Some(Event::Close(code))) => {
                    let mut reply = Vec::new();
                    frame::push_client_frame(Opcode::Close, &code.to_be_bytes(), &mut reply);
                    let _ = client.send(&reply);
                    return self.lose(slot, code);
                }
                Err(_) => return self.end(slot, "broken frame"),
            }
        }
    }

    /// Counts a message, and whether it is the next of its channel.
    fn take(&mut self, slot: u32, stamp: Stamp, now: u64) {
        let took_ns = now.saturating_sub(stamp.sent_ns);
        let lane = usize::from(stamp.shared);
        if slot >= self.measured {
            self.round.aside += 1;
        } else {
            self.round.delivered += 1;
            let Tally { latency, shared_latency, .. } = &mut self.tally;
            let latency = if stamp.shared { shared_latency } else { latency };
            latency.saturating_record(took_ns);
        }
        if stamp.sent_ns <= self.mark_ns {
            self.tally.late += 1;
            self.tally.late_last_ns = now;
        }
        let expected = &mut self.clients[slot as usize].expected[lane];
        // A client that resumes has to get everything from the first message on.
        let first = self.config.target.resumes().then_some(0);
        if let Some(expected) = expected.or(first)
            && expected != stamp.number
        {
            self.tally.out_of_order += 1;
            self.tally.repeated += u64::from(stamp.number < expected);
        }
        *expected = Some(stamp.number.wrapping_add(1));
    }

    /// Answers a call as an agent does.
    fn answer(&mut self, slot: u32, call: CallStamp) {
        let mut answer = br#"{"type":"tool_response","requestId":""#.to_vec();
        call.write(&mut answer);
        answer.extend_from_slice(br#"","success":true,"result":{"ok":true},"executionTime":1}"#);
        let mut sent = Vec::with_capacity(answer.len() + 8);
        frame::push_client_frame(Opcode::Text, &answer, &mut sent);
        self.round.delivered += 1;
        self.send(slot, &sent);
    }

    fn take_notice(&mut self, slot: u32, notice: Notice) {
        match notice {
            Notice::Ping => {
                let mut pong = Vec::new();
                frame::push_client_frame(Opcode::Text, br#"{"type":"pong"}"#, &mut pong);
                self.tally.pings += 1;
                return self.send(slot, &pong);
            }
            Notice::Resumed => self.tally.resumed += 1,
            Notice::HistoryLost => self.tally.history_lost += 1,
            Notice::BusRecovered => self.tally.bus_recovered += 1,
            Notice::Other => {}
        }
        self.tally.unstamped += 1;
    }
}
