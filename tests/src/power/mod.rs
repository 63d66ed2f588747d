//! Power that fails: what programs do to a folder is recorded, and what a disk could hold at any moment of it is made again.
//!
//! The model is stricter than common file systems: content is on the disk when the file was synced, a name when its folder was.

mod disk;
mod trace;

pub use disk::{Disk, VIEWS, View};
pub use trace::{Op, recorded};

/// Calls that change files, as `strace` wants them. Those that the model does not know end the reading of a record with a failure.
pub const CALLS: &str = "open,openat,openat2,creat,write,writev,pwrite64,pwritev,pwritev2,ftruncate,truncate,fallocate,copy_file_range,sendfile,\
     splice,lseek,rename,renameat,renameat2,link,linkat,symlink,symlinkat,mkdir,mkdirat,rmdir,unlink,unlinkat,mknodat,fsync,\
     fdatasync,sync_file_range,syncfs,sync,msync,ioctl";
