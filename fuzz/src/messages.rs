//! Packets on the control socket, from whoever may open it.

use vmctl::vmm::control;
use vmctl::vmm::protocol::{Request, VERSION};

pub fn control(data: &[u8]) {
    let Ok(verb) = control::parse(data) else { return };
    // What is understood is understood in the same way once it is written by us.
    let request = Request { version: VERSION, verb };
    let text = serde_json::to_vec(&request).expect("our own request");
    assert_eq!(control::parse(&text).expect("our own request"), request.verb);
}
