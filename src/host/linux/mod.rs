//! The real host: the kernel, the disks and the VM processes.

pub mod storage;
