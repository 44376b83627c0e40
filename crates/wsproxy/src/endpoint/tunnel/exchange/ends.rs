//! Ends of streams in the words of refusals. Knows no answer.

use wsproxy_proto::tunnel::{
    code::Code as ResetCode,
    event::{End, ResetByPeer},
    frame::Reset,
};

use crate::endpoint::tunnel::refusal::{Code, Refusal};

/// Returns the refusal of a request whose stream ended without a head, or the reason why its answer breaks off.
/// `is_closing`: this instance ends, and with it its lanes.
pub(super) fn refusal(end: &End, is_closing: bool) -> Refusal {
    match end {
        End::Reset(reset) => of_peer(reset),
        End::ResetHere(code) => Refusal::of_reset(&Reset::new(*code)),
        End::GoneAway(_) => Refusal::new(Code::Restarting).undispatched(),
        End::LaneLost { not_dispatched } => {
            let code = if is_closing { ResetCode::Restarting } else { ResetCode::UpstreamReset };
            let refusal = match is_closing {
                true => Refusal::of_reset(&Reset::new(code)),
                false => Refusal::new(Code::LaneLost),
            };
            if *not_dispatched { refusal.undispatched() } else { refusal }
        }
        // An end before any head.
        End::Complete => Refusal::new(Code::Protocol),
    }
}

fn of_peer(reset: &ResetByPeer) -> Refusal {
    Refusal::of_reset(&Reset {
        code: reset.code,
        not_dispatched: reset.not_dispatched,
        head_sent: reset.head_sent,
        stop: false,
        retry_after_ms: reset.retry_after_ms,
        message: &reset.message,
    })
}
