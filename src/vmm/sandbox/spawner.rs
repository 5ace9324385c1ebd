//! Makes devices after the launch.
//!
//! The event loop's filter forbids to make threads, and a thread that it made would inherit that filter.
//! So a thread is made early that does nothing but wait for work: it has only the first, widest filter
//! (see [`super::Filters`]), and so have the threads that it makes, until they install their role's own on
//! top. It hears nothing from the guest and reads no socket: the event loop hands it whole devices to
//! make.
//!
//! ```ignore
//! let block = spawner.run(move |start| Block::new(&disk, file, backing, start))??;
//! ```

use std::io;
use std::sync::mpsc;
use std::thread::Builder;

use crate::vmm::device::ThreadStart;

/// Enough for opening an image in a debug build; only touched pages count.
const STACK_BYTES: usize = 512 * 1024;

type Job = Box<dyn FnOnce(&ThreadStart) + Send>;

/// The spawner, which waits for work until this is dropped.
pub struct Spawner {
    jobs: mpsc::Sender<Job>,
}

impl Spawner {
    /// `devices` becomes the hook of each device thread that is made. To be called under the first filter,
    /// before the calling thread has one of its own.
    pub fn start(devices: ThreadStart) -> io::Result<Self> {
        let (jobs, todo) = mpsc::channel::<Job>();
        Builder::new().name("spawner".into()).stack_size(STACK_BYTES).spawn(move || {
            for job in todo {
                job(&devices);
            }
        })?;
        Ok(Self { jobs })
    }

    /// Runs `job` on the spawner's thread and waits for its result: for making devices, whose threads are
    /// then made there. A panic in it ends the process, as everywhere.
    pub fn run<R: Send + 'static>(
        &self,
        job: impl FnOnce(&ThreadStart) -> R + Send + 'static,
    ) -> io::Result<R> {
        let (reply, answer) = mpsc::sync_channel(1);
        let job = Box::new(move |start: &ThreadStart| {
            // The caller waits.
            let _ = reply.send(job(start));
        });
        let ended = || io::Error::new(io::ErrorKind::BrokenPipe, "the spawner has ended");
        self.jobs.send(job).map_err(|_| ended())?;
        answer.recv().map_err(|_| ended())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::device::ThreadRole;
    use std::sync::Arc;

    #[test]
    fn work_is_done_on_its_thread_with_the_hook() {
        let spawner = Spawner::start(Arc::new(|role| match role {
            ThreadRole::Block => Ok(()),
            _ => Err(io::Error::other("refused")),
        }))
        .unwrap();
        let name = || std::thread::current().name().map(str::to_owned);
        let (block, net, on) =
            spawner.run(move |start| (start(ThreadRole::Block), start(ThreadRole::Net), name())).unwrap();
        assert!(block.is_ok());
        assert_eq!(net.unwrap_err().to_string(), "refused");
        assert_eq!(on.as_deref(), Some("spawner"));
        assert!(spawner.run(|_| -> () { panic!("as a broken device would") }).is_err());
    }
}
