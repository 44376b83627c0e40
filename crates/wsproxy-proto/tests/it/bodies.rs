//! Bodies of the fuzz targets. Plain tests run them with the committed seeds.

use std::collections::HashSet;

use buffa::Message as _;
use http::header::{HeaderMap, HeaderName, HeaderValue, SEC_WEBSOCKET_EXTENSIONS};
use http::uri::PathAndQuery;
use http::{Method, Version};
use wsproxy_proto::agents::answer::{self, Answer, Form};
use wsproxy_proto::agents::command::{self, BadCommandKind, Command};
use wsproxy_proto::agents::message::{self, AgentMessage, BadMessage};
use wsproxy_proto::agents::writer;
use wsproxy_proto::history::{After, Envelope, Position};
use wsproxy_proto::json::{members::Members, validate};
use wsproxy_proto::names::Id;
use wsproxy_proto::proxy_header::{HEADER_BYTES_MAX, Look, ProxyHeaderError, is_header, look};
use wsproxy_proto::rooms::check::{self, Body, Checked, Kind, Refused};
use wsproxy_proto::rooms::stamp;
use wsproxy_proto::rooms::text::{to_binary, to_text};
use wsproxy_proto::rooms::v1::Envelope as RoomEnvelope;
use wsproxy_proto::rooms::v1::envelope::Payload;
use wsproxy_proto::tunnel;
use wsproxy_proto::tunnel::code::Code;
use wsproxy_proto::tunnel::event::Event;
use wsproxy_proto::tunnel::frame::{Frame, Frames, Head, Open, Reset, Source, StreamFrame};
use wsproxy_proto::tunnel::headers::Headers;
use wsproxy_proto::tunnel::lane::{Lane, LaneConfig};
use wsproxy_proto::tunnel::memory::{Memory, MemoryLimits};
use wsproxy_proto::ws::client::{ClientRequest, Response, read_response};
use wsproxy_proto::ws::deflate::{Deflater, Deflaters, Policy, negotiate};
use wsproxy_proto::ws::frame::{Opcode, Role};
use wsproxy_proto::ws::handshake::{read_upgrade, subprotocols};
use wsproxy_proto::ws::receiver::Limits;

use crate::support::{Ear, MASK, NO_TAKEOVER, Said, TAKEOVER, frame};

/// Input: one byte of settings, one that decides the split, and the bytes of the peer.
pub(crate) fn receiver(data: &[u8]) {
    let [settings, split, bytes @ ..] = data else { return };
    let role = if settings & 1 == 0 { Role::Server } else { Role::Client };
    let deflate = [None, Some(NO_TAKEOVER), Some(TAKEOVER)][usize::from(settings >> 1) % 3];
    let mut whole = Ear::new(role, LIMITS, deflate);
    whole.hear(bytes);
    let mut parts = Ear::new(role, LIMITS, deflate);
    let (mut rest, mut state) = (bytes, u32::from(*split));
    while !rest.is_empty() {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let most = 1 + (state >> 8) as usize % (1 << (split % 8));
        let (chunk, after) = rest.split_at(most.min(rest.len()));
        parts.hear(chunk);
        rest = after;
        assert!(parts.receiver.heap_bytes() <= 2 * LIMITS.message_bytes_max + 512 + (48 << 10));
    }
    assert_eq!((&parts.said, parts.error), (&whole.said, whole.error));
    // The kept bytes depend on the bytes that came, not on their split.
    assert_eq!(parts.receiver.heap_bytes() == 0, whole.receiver.heap_bytes() == 0);
    for said in &whole.said {
        let length = match said {
            Said::Text(text) => text.len(),
            Said::Binary(bytes) => bytes.len(),
            _ => 0,
        };
        assert!(length <= LIMITS.message_bytes_max);
    }
}

/// Input: one byte of settings. The rest is compressed and inflated again, and also taken as compressed data.
pub(crate) fn deflate(data: &[u8]) {
    let [settings, bytes @ ..] = data else { return };
    let limits = Limits { message_bytes_max: bytes.len(), fragments_max: 1 };
    let takeover = settings & 1 == 1;
    let params = if takeover { TAKEOVER } else { NO_TAKEOVER };
    let (level, bits) = (1 + u32::from(settings >> 1) % 9, 9 + (settings >> 4) % 7);
    let said = Said::Binary(bytes.to_vec());

    let mut deflater = Deflater::new(level, bits, takeover);
    let mut ear = Ear::new(Role::Server, limits, Some(params));
    for _ in 0..2 {
        let payload = deflater.compress(bytes).to_vec();
        ear.hear(&frame(true, true, Opcode::Binary, &payload, Some(MASK)));
    }
    assert_eq!((&ear.said[..], ear.error), (&[said.clone(), said.clone()][..], None));

    if let Some(payload) = Deflaters::new(level).compress(bits, bytes) {
        let mut ear = Ear::new(Role::Server, limits, Some(NO_TAKEOVER));
        ear.hear(&frame(true, true, Opcode::Binary, payload, Some(MASK)));
        assert_eq!((&ear.said[..], ear.error), (&[said][..], None));
    }

    let mut ear = Ear::new(Role::Server, LIMITS, Some(params));
    let damaged = frame(true, true, Opcode::Binary, bytes, Some(MASK));
    ear.hear(&damaged).hear(&damaged);
    assert!(ear.error.is_some() || ear.said.len() == 2);
}

/// Input: header lines of a request. The same bytes are taken as a server's answer.
pub(crate) fn handshake(data: &[u8]) {
    let mut headers = HeaderMap::new();
    for line in data.split(|byte| *byte == b'\n').take(50) {
        let mut parts = line.splitn(2, |byte| *byte == b':');
        let name = HeaderName::from_bytes(parts.next().unwrap_or_default());
        let value = HeaderValue::from_bytes(parts.next().unwrap_or_default());
        if let (Ok(name), Ok(value)) = (name, value) {
            headers.append(name, value);
        }
    }
    if let Ok(upgrade) = read_upgrade(&Method::GET, Version::HTTP_11, &headers) {
        assert_eq!(upgrade.accept.len(), 28);
    }
    assert!(subprotocols(&headers).all(|name| !name.is_empty() && !name.contains(',')));
    for client_context_takeover in [false, true] {
        let policy = Policy { client_context_takeover, ..Policy::default() };
        let Some((params, answer)) = negotiate(&headers, &policy) else { continue };
        assert!(HeaderValue::from_str(&answer).is_ok());
        assert!(params.server_no_context_takeover);
        assert!((9..=15).contains(&params.server_max_window_bits));
        assert!((8..=15).contains(&params.client_max_window_bits));
        for name in ["server_max_window_bits", "client_max_window_bits"] {
            let asked = headers.get_all(SEC_WEBSOCKET_EXTENSIONS).iter();
            let mut asked = asked.filter_map(|value| value.to_str().ok());
            assert!(!answer.contains(name) || asked.any(|value| value.contains(name)));
        }
    }
    let request = ClientRequest::new(
        HeaderValue::from_static("example.org"),
        PathAndQuery::from_static("/"),
        *b"the sample nonce",
    );
    let request = request.subprotocol("one").deflate(TAKEOVER);
    match read_response(data, &request) {
        Ok(Response::Accepted { consumed, subprotocol, .. }) => {
            assert!(consumed <= data.len() && subprotocol.is_none_or(|name| name == "one"));
        }
        Ok(Response::Refused { consumed, .. }) => assert!(consumed <= data.len()),
        Ok(Response::Incomplete) | Err(_) => {}
    }
}

/// Input: a text, judged by this crate and by `serde_json`. The latter allows 127 levels, and has a limit of the size
/// of numbers.
pub(crate) fn json(data: &[u8]) {
    let verdict = validate(data, 127);
    let oracle = serde_json::from_slice::<serde_json::Value>(data);
    let oracle = oracle.map_err(|error| error.to_string());
    let too_large = matches!(&oracle, Err(text) if text.starts_with("number out of range"));
    if !too_large {
        assert_eq!(verdict.is_ok(), oracle.is_ok(), "{verdict:?} {oracle:?}");
    }
    if let Err(error) = verdict {
        assert!(error.offset <= data.len());
    }
}

/// Input: a message of a channel, a position, and the last event id of a client.
pub(crate) fn history(data: &[u8]) {
    if let Some(envelope) = Envelope::parse(data) {
        assert_eq!(Envelope::parse(&envelope.encode()), Some(envelope));
        // Each accepted input is the only form of its value.
        assert_eq!(envelope.encode(), data);
    }
    if let Some(position) = Position::parse(data) {
        assert_eq!(position.to_string().as_bytes(), data);
    }
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(after) = After::parse(text) {
        let again = after.as_ref().map_or_else(String::new, After::to_string);
        assert_eq!(After::parse(&again), Ok(after));
        assert!(again == text);
        assert!(again.len() <= 128 && !again.contains([' ', '\n', '\r', '\0']));
    }
}

/// Input: a payload of the channel of commands to an agent.
pub(crate) fn agent_command(data: &[u8]) {
    let read = command::parse(data);
    let is_object = !matches!(&read, Err(bad) if bad.kind == BadCommandKind::NotAnObject);
    assert_eq!(is_object, is_json_object(data), "{read:?}");
    let again = match &read {
        Ok(Command::Call(call)) => {
            let sent = writer::tool_call(&call.request, &call.tool, call.params, None);
            assert!(is_json_object(&sent) && contains(data, call.params));
            call.encode()
        }
        Ok(Command::Cancel { request, reply_to }) => command::cancel(request, reply_to.as_ref()),
        Ok(Command::Owner(marker)) => marker.encode(),
        Ok(Command::Other) | Err(_) => return,
    };
    assert_eq!(command::parse(&again), read);
}

/// Input: a message of an agent.
pub(crate) fn agent_message(data: &[u8]) {
    let read = message::parse(data);
    assert_eq!(read != Err(BadMessage::NotAnObject), is_json_object(data), "{read:?}");
    let Ok(user) = Id::parse("u1") else { return };
    match &read {
        Ok(AgentMessage::Response(response)) => {
            assert!(is_json_object(&answer::response(&user, response, Form::Request)));
            let published = answer::response(&user, response, Form::Caller);
            let Some(Answer::Ended(answer)) = Answer::parse(&published) else { panic!("{read:?}") };
            assert_eq!((answer.success, answer.result), (response.success, response.result));
            assert_eq!(answer.error, response.error.as_deref());
            assert_eq!(answer.execution_time, response.execution_time);
            assert!(response.result.is_none_or(|result| contains(data, result)));
        }
        Ok(AgentMessage::Progress(progress)) => {
            assert!(is_json_object(&answer::progress_data(progress)));
            let published = answer::progress(&user, progress);
            let told = Answer::Progress { user, progress: progress.clone() };
            assert_eq!(Answer::parse(&published), Some(told));
        }
        Ok(AgentMessage::Heartbeat | AgentMessage::Hello(_)) | Err(_) => {}
    }
}

/// Input: an envelope of a room.
pub(crate) fn room_envelope(data: &[u8]) {
    let whole = RoomEnvelope::decode_from_slice(data);
    let message_id = check::message_id(data);
    let checked = match check::read(data) {
        Ok(checked) => checked,
        Err(Refused::NoEnvelope) => {
            return assert!(
                !whole.is_ok_and(|whole| whole.payload.is_some()),
                "a decoder reads it"
            );
        }
        Err(refused) => return assert!(matches!(refused, Refused::Invalid(_)), "{refused:?}"),
    };
    let whole = whole.unwrap();
    assert!(says_the_same(&checked, &whole), "{checked:?} {whole:?}");
    assert_eq!(message_id, checked.message_id);

    let mut stamped = Vec::new();
    stamp::stamp(data, checked.stamp, "alice-1", None, &mut stamped);
    assert!(stamped.starts_with(data));
    let told = RoomEnvelope::decode_from_slice(&stamped).unwrap();
    assert_eq!((told.sender.as_str(), told.seq), ("alice-1", 0));
    assert_eq!(
        (&told.payload, &told.to, told.reliable),
        (&whole.payload, &whole.to, whole.reliable)
    );
    let again = check::read(&stamped).unwrap();
    assert_eq!((again.sender, again.body), ("alice-1", checked.body));
    assert_eq!(again.stamp.message_type, None);

    let text = to_text(&stamped).unwrap();
    let back = to_binary(text.as_bytes()).unwrap();
    assert_eq!(RoomEnvelope::decode_from_slice(&back), Ok(told));
    if let Err(refused) = check::check(data, "alice-1") {
        assert!(matches!(refused, Refused::NotAllowed(_) | Refused::WrongSender(_)), "{refused:?}");
    }
}

/// Returns whether a decoder of whole messages found what the check found.
fn says_the_same(checked: &Checked<'_>, whole: &RoomEnvelope) -> bool {
    let payload = match (whole.payload.as_ref().unwrap(), checked.body) {
        (Payload::PositionUpdate(message), Body::Position { entity, .. }) => {
            message.entity_id == entity && {
                let floats = [message.position.x, message.position.y, message.position.z];
                floats.iter().all(|float| float.is_finite())
            }
        }
        (Payload::EntitySpawn(message), Body::Spawn { entity, owner, .. }) => {
            message.entity_id == entity
                && message.owner_id == owner
                && message.components.len() <= 64
        }
        (Payload::EntityUpdate(message), Body::Update { entity, .. }) => {
            message.entity_id == entity
        }
        (Payload::EntityDespawn(message), Body::Despawn { entity }) => message.entity_id == entity,
        (Payload::ChatMessage(message), Body::Chat { from }) => message.from_client_id == from,
        (Payload::PresenceEvent(message), Body::Presence { event, client, data }) => {
            message.client_id == client
                && message.event_type.to_i32() == event as i32
                && message.data.is_set() == data.is_some()
        }
        (Payload::Ack(message), Body::Ack(ack)) => {
            message.seq == ack.seq && message.more == ack.more().collect::<Vec<_>>()
        }
        (Payload::ClientHello(message), Body::Hello(hello)) => {
            let has = |feature| message.features.iter().any(|other| other == feature);
            (hello.batch, hello.acks) == (has("batch"), has("acks"))
                && message.display_name == hello.display_name
                && message.presence.is_set() == hello.presence.is_some()
        }
        (Payload::Custom(message), Body::Custom { name, data }) => {
            message.name == name && message.data == data
        }
        (Payload::ServerHello(_), Body::Other) => checked.kind == Kind::ServerHello,
        (Payload::Error(_), Body::Other) => checked.kind == Kind::Error,
        (Payload::PositionBatch(_), Body::Other) => checked.kind == Kind::Batch,
        _ => false,
    };
    payload
        && whole.message_id == checked.message_id
        && whole.to == checked.to.unwrap_or_default()
        && whole.sender == checked.sender
        && whole.reliable == checked.reliable
        && checked.stamp.overrules_seq == (whole.seq != 0)
}

/// Input: a text frame of a room.
pub(crate) fn room_text(data: &[u8]) {
    let Ok(binary) = to_binary(data) else { return };
    let whole = RoomEnvelope::decode_from_slice(&binary).unwrap();
    assert!(whole.payload.is_some());
    assert_ne!(check::read(&binary), Err(Refused::NoEnvelope));
    room_envelope(&binary);
}

/// Input: the first bytes of a connection. They are judged alike, however they come and whatever follows.
pub(crate) fn proxy_header(data: &[u8]) {
    match look(data) {
        Ok(Look::Whole(_, length)) => {
            assert!(length <= data.len() && length <= HEADER_BYTES_MAX);
            assert_eq!(is_header(data), Some(true));
            assert_eq!(look(&data[..length]), look(data));
            (0..length).for_each(|end| assert_eq!(look(&data[..end]), Ok(Look::Partial)));
        }
        Ok(Look::Partial) => {
            assert!(data.len() < HEADER_BYTES_MAX && is_header(data) != Some(false));
        }
        Err(ProxyHeaderError::Missing) => assert_eq!(is_header(data), Some(false)),
        Err(error) => {
            assert_eq!(is_header(data), Some(true));
            assert_eq!(look(&[data, b"more"].concat()), Err(error));
        }
    }
}

/// Input: a message of a lane of the tunnel. Frames that were read are written with bytes that are read as the same.
pub(crate) fn tunnel_frames(data: &[u8]) {
    let Ok(frames) = Frames::new(data) else { return };
    let frames: Vec<_> = frames.filter_map(Result::ok).collect();
    let mut written = Vec::new();
    for frame in &frames {
        frame.encode(&mut written).unwrap();
        if let Frame::Stream(_, StreamFrame::Open(open)) = frame {
            assert!(open.headers.iter().all(|(name, _)| !name.is_empty()));
        }
    }
    // Of frames with absent or unknown parts the written ones are larger.
    let Ok(again) = Frames::new(&written) else { return };
    assert!(again.map(Result::unwrap).eq(frames));
}

/// Input: the role, and steps of four numbers each: a frame of the peer with some of the bytes behind it, or a call.
/// Whatever the peer says, a stream ends once, and the lane holds no more than it may.
pub(crate) fn tunnel_lane(data: &[u8]) {
    let [role, steps @ ..] = data else { return };
    let role = if role & 1 == 0 { tunnel::lane::Role::Gateway } else { tunnel::lane::Role::Agent };
    let limits = MemoryLimits { window: 1000, window_max: 16_000, ..MemoryLimits::default() };
    let config = LaneConfig { streams_max: 4, head_bytes_max: 200, ..LaneConfig::default() };
    let mut lane = Lane::new(role, config, Memory::new(limits), 0);
    let (mut now, mut steps, mut out) = (0, steps, Vec::new());
    let (mut begun, mut ended) = (HashSet::new(), HashSet::new());
    // HELLO with one version.
    let _ = lane.receive(0, b"\0\0\0\0\x01\0\0\x05\x01\0\x02\x01\x01");
    while let [kind, stream, flags, length, rest @ ..] = steps {
        let number = u32::from(*stream % 32);
        now += u64::from(*flags) * 1000;
        let (bytes, rest) = rest.split_at(rest.len().min((*length).into()));
        steps = rest;
        if *kind < 128 {
            let mut frame = number.to_be_bytes().to_vec();
            frame.extend([*kind, *flags, 0, bytes.len() as u8]);
            frame.extend(bytes);
            let _ = lane.receive(now, &frame);
        } else {
            call(&mut lane, now, *kind, number, bytes);
            out.clear();
            if *kind & 1 == 0 && lane.write_batch(now, &mut out) {
                assert!(Frames::new(&out).unwrap().all(|frame| frame.is_ok()));
            }
        }
        while let Some(event) = lane.poll() {
            match event {
                Event::Opened(number, _) => assert!(begun.insert(number)),
                Event::Ended(number, _) => assert!(ended.insert(number)),
                _ => {}
            }
        }
        assert!(role == tunnel::lane::Role::Gateway || ended.is_subset(&begun));
        assert!(lane.streams() <= if role == tunnel::lane::Role::Gateway { 1024 } else { 4 });
        assert!(lane.buffered_bytes() <= lane.streams() * (64 << 10));
    }
}

fn call(lane: &mut Lane, now: u64, kind: u8, number: u32, bytes: &[u8]) {
    let headers = Headers::default();
    let end = bytes.len().is_multiple_of(2);
    match kind >> 1 & 15 {
        0 => {
            let open = Open { end, upgrade: kind > 191, ..OPEN };
            let _ = lane.open(now, &open);
        }
        1 => {
            let status = [200, 100, 101][bytes.len() % 3];
            let head = Head { end, status, source: Source::Agent, headers };
            let _ = lane.send_head(number, &head);
        }
        2..=4 => drop(lane.put(number, &mut bytes.repeat(50).into())),
        5 => drop(lane.finish(number)),
        6 => drop(lane.finish_with_trailers(number, headers)),
        7..=9 => drop(lane.take(now, number)),
        10 => lane.stop(number),
        11 => lane.reset(number, &Reset::new(Code::Cancelled)),
        12 => drop(lane.tick(now)),
        13 => lane.go_away(Code::Restarting, 20_000),
        _ => {}
    }
}

/// Returns whether `text` is a JSON object with at most 128 levels, whose strings may have halves of surrogate pairs.
fn is_json_object(text: &[u8]) -> bool {
    Members::of(text, 128).is_ok_and(|mut members| members.all(|member| member.is_ok()))
}

/// Returns whether `part` was borrowed from `whole`, or stands for an absent part.
fn contains(whole: &[u8], part: &[u8]) -> bool {
    part == b"{}" || whole.as_ptr_range().contains(&part.as_ptr())
}

const LIMITS: Limits = Limits { message_bytes_max: 2000, fragments_max: 6 };

/// Request of which some fields are set.
const OPEN: Open<'static> = Open::new(b"GET", b"/");
