//! The cloud-init seed of a VM: a small FAT file system, made anew at each start.
//!
//! It holds secrets, so it is for root alone, lies where the host forgets it when it is switched off, and is
//! made under a name that nobody else can have put there. The same texts give the same bytes.

use std::fs::File;
use std::io::{self, Cursor, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use fatfs::{FatType, FileSystem, FormatVolumeOptions, FsOptions};

use crate::host::snapshot::{Seed, UserData};

/// Most bytes of user data; a cloud's metadata service gives far less.
pub const USER_DATA_BYTES_MAX: u64 = 1 << 20;
/// What cloud-init looks for among the labels of file systems.
const LABEL: [u8; 11] = *b"CIDATA     ";
/// Any number: the same one each time.
const VOLUME_ID: u32 = 0x6369_6461;
const IMAGE_BYTES_MIN: usize = 512 << 10;

/// The image's bytes.
pub fn image(seed: &Seed) -> io::Result<Vec<u8>> {
    let user_data = match &seed.user_data {
        UserData::Text(text) => text.clone().into_bytes(),
        UserData::File(path) => read_user_data(path)
            .map_err(|error| io::Error::new(error.kind(), format!("read {}: {error}", path.display())))?,
    };
    let mut files = vec![("meta-data", seed.meta_data.as_bytes()), ("user-data", &user_data)];
    files.extend(seed.network_config.as_ref().map(|text| ("network-config", text.as_bytes())));
    let content: usize = files.iter().map(|(_, bytes)| bytes.len()).sum();
    // Room for tables, the directory, and the end of each file's last cluster.
    let bytes = (content + (128 << 10)).next_multiple_of(IMAGE_BYTES_MIN);
    let mut disk = Cursor::new(vec![0; bytes]);
    let options = FormatVolumeOptions::new()
        .volume_label(LABEL)
        .volume_id(VOLUME_ID)
        .fat_type(FatType::Fat12)
        .bytes_per_cluster(2048);
    fatfs::format_volume(&mut disk, options)?;
    {
        let volume = FileSystem::new(&mut disk, FsOptions::new().update_accessed_date(false))?;
        for (name, bytes) in files {
            let mut file = volume.root_dir().create_file(name)?;
            file.write_all(bytes)?;
            file.flush()?;
        }
        volume.unmount()?;
    }
    Ok(disk.into_inner())
}

fn read_user_data(path: &Path) -> io::Result<Vec<u8>> {
    // Without waiting: somebody may have put a FIFO there.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(USER_DATA_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > USER_DATA_BYTES_MAX {
        return Err(io::Error::other(format!("it has more than {USER_DATA_BYTES_MAX} bytes")));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seed(user_data: UserData) -> Seed {
        Seed {
            meta_data: "instance-id: \"i\"\n".to_owned(),
            network_config: Some("version: 2\n".to_owned()),
            user_data,
        }
    }

    fn read(image: Vec<u8>, name: &str) -> String {
        let volume = FileSystem::new(Cursor::new(image), FsOptions::new()).unwrap();
        let mut text = String::new();
        volume.root_dir().open_file(name).unwrap().read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn what_is_written_is_read_back() {
        let long = format!("#cloud-config\n# {}\n", "x".repeat(900_000));
        let image = image(&seed(UserData::Text(long.clone()))).unwrap();
        let volume = FileSystem::new(Cursor::new(image.clone()), FsOptions::new()).unwrap();
        assert_eq!(volume.volume_label(), "CIDATA");
        assert_eq!(volume.read_volume_label_from_root_dir().unwrap().as_deref(), Some("CIDATA"));
        let names: Vec<String> = volume.root_dir().iter().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["meta-data", "user-data", "network-config"]);
        drop(volume);
        assert_eq!(read(image.clone(), "user-data"), long);
        assert_eq!(read(image.clone(), "meta-data"), "instance-id: \"i\"\n");
        assert_eq!(read(image, "network-config"), "version: 2\n");
    }

    #[test]
    fn the_same_texts_give_the_same_bytes() {
        let make = || image(&seed(UserData::Text("#!/bin/sh\n".to_owned()))).unwrap();
        let first = make();
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(first, make());
        assert_eq!(first.len(), 512 << 10);
    }

    #[test]
    fn user_data_of_a_file_is_bounded() {
        let path = std::env::temp_dir().join(format!("vmctl-seed-{}", std::process::id()));
        std::fs::write(&path, vec![b'#'; USER_DATA_BYTES_MAX as usize + 1]).unwrap();
        let error = image(&seed(UserData::File(path.clone()))).unwrap_err().to_string();
        assert!(error.contains("more than 1048576 bytes"), "{error}");
        std::fs::write(&path, "#!/bin/sh\n").unwrap();
        assert_eq!(read(image(&seed(UserData::File(path.clone()))).unwrap(), "user-data"), "#!/bin/sh\n");
        std::fs::remove_file(&path).unwrap();
        assert!(image(&seed(UserData::File(path))).is_err());
    }
}
