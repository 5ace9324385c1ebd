//! The control queue (virtio 1.2, section 5.1.6.5): what the driver asks of the NIC as a whole.
//!
//! Frames aren't filtered by their addresses here (VIRTIO_NET_F_CTRL_RX): the bridge does that, and
//! what it floods a guest may see.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR,
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_MQ, VIRTIO_NET_OK,
};

use crate::vmm::device::buffers::Buffers;
use crate::vmm::device::queue::{BrokenQueue, VirtQueue};
use crate::vmm::memory::GuestMemory;

/// The features that a driver may switch off and on again.
pub(super) const GUEST_OFFLOADS: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN;

/// The longest command that we know: class, command, and the offloads.
const COMMAND_BYTES_MAX: usize = 10;
/// Commands served before other queues have their turn.
const COMMANDS_PER_TURN: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// The driver uses so many pairs from now on.
    SetPairs(u16),
    Announced,
    /// The features of [`GUEST_OFFLOADS`] that are on from now on.
    SetOffloads(u64),
}

impl Command {
    /// What the driver says, if it may say it.
    fn parse(bytes: &[u8], features: u64, pairs_max: u16) -> Option<Self> {
        let negotiated = |feature: u32| features & 1 << feature != 0;
        let (&[class, command], data) = bytes.split_first_chunk::<2>()?;
        match (class.into(), command.into()) {
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) if negotiated(VIRTIO_NET_F_MQ) => {
                let pairs = u16::from_le_bytes(data.try_into().ok()?);
                (1..=pairs_max).contains(&pairs).then_some(Self::SetPairs(pairs))
            }
            (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK)
                if negotiated(VIRTIO_NET_F_GUEST_ANNOUNCE) && data.is_empty() =>
            {
                Some(Self::Announced)
            }
            (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET)
                if negotiated(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS) =>
            {
                let offloads = u64::from_le_bytes(data.try_into().ok()?);
                (offloads & !(features & GUEST_OFFLOADS) == 0).then_some(Self::SetOffloads(offloads))
            }
            _ => None,
        }
    }
}

pub(super) struct Control {
    queue: VirtQueue,
    features: u64,
    /// Pairs whose queues the driver has set up.
    pairs_max: u16,
    buffers: Buffers,
    /// There is more to do than one turn allows.
    unfinished: bool,
}

impl Control {
    pub fn new(queue: VirtQueue, features: u64, pairs_max: u16) -> Self {
        Self { queue, features, pairs_max, buffers: Buffers::new(), unfinished: true }
    }

    pub fn queue(&self) -> &VirtQueue {
        &self.queue
    }

    pub fn queue_mut(&mut self) -> &mut VirtQueue {
        &mut self.queue
    }

    pub fn is_unfinished(&self) -> bool {
        self.unfinished
    }

    /// Serves what the driver asks; `carry_out` says whether a command was.
    pub fn serve(
        &mut self,
        memory: &GuestMemory,
        mut carry_out: impl FnMut(Command) -> bool,
    ) -> Result<(), BrokenQueue> {
        self.queue.disable_notifications(memory)?;
        for _ in 0..COMMANDS_PER_TURN {
            let Some(chain) = self.queue.pop(memory)? else {
                self.unfinished = self.queue.enable_notifications(memory)?;
                if self.unfinished {
                    continue;
                }
                return Ok(());
            };
            let head = chain.head_index();
            let loaded = self.buffers.load(chain).is_ok();
            let written = if loaded { self.answer(memory, &mut carry_out) } else { 0 };
            self.queue.push_used(memory, head, written)?;
        }
        self.unfinished = true;
        Ok(())
    }

    /// Gives how much was written: the answer is one byte.
    fn answer(&self, memory: &GuestMemory, carry_out: &mut impl FnMut(Command) -> bool) -> u32 {
        let mut readable = self.buffers.readable(memory);
        let mut bytes = [0; COMMAND_BYTES_MAX];
        let done = usize::try_from(readable.len())
            .ok()
            .and_then(|len| bytes.get_mut(..len))
            .filter(|_| self.buffers.writable(memory).len() > 0)
            .and_then(|bytes| readable.read_exact(bytes).ok().and(Some(&*bytes)))
            .and_then(|bytes| Command::parse(bytes, self.features, self.pairs_max))
            .is_some_and(carry_out);
        let answer = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR } as u8;
        // A driver that left no place for the answer gets none.
        u32::from(self.buffers.writable(memory).write_all(&[answer]).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = u64::MAX;

    fn check(bytes: &[u8], features: u64, expected: Option<Command>) {
        assert_eq!(Command::parse(bytes, features, 4), expected, "{bytes:?}");
    }

    #[test]
    fn commands_are_taken_only_whole_and_as_negotiated() {
        check(&[4, 0, 4, 0], ALL, Some(Command::SetPairs(4)));
        check(&[4, 0, 5, 0], ALL, None);
        check(&[4, 0, 0, 0], ALL, None);
        check(&[4, 0, 1], ALL, None);
        check(&[4, 0, 1, 0, 0], ALL, None);
        check(&[4, 1, 1, 0], ALL, None);
        check(&[4, 0, 1, 0], ALL & !(1 << VIRTIO_NET_F_MQ), None);
        check(&[3, 0], ALL, Some(Command::Announced));
        check(&[3, 0, 0], ALL, None);
        check(&[3, 0], 0, None);
        check(&[5, 0, 0x82, 0, 0, 0, 0, 0, 0, 0], ALL, Some(Command::SetOffloads(0x82)));
        // More than was negotiated, or what is no such offload.
        check(&[5, 0, 0x82, 0, 0, 0, 0, 0, 0, 0], 1 << 2 | 1 << 1, None);
        check(&[5, 0, 0x20, 0, 0, 0, 0, 0, 0, 0], ALL, None);
        for bytes in [&[][..], &[0], &[0, 0], &[1, 1, 1, 2, 3, 4, 5, 6], &[255, 255]] {
            check(bytes, ALL, None);
        }
    }
}
