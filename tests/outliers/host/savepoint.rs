//! Checkpoints of a pass are fetched while the worker runs and sent to the next instance.

use outliers::host::Stamp;
use outliers::units::Bytes;

use super::*;

#[tokio::test]
async fn new_small_save_point_is_fetched_and_sent_to_the_next_instance() {
    let (Some(fixture), Some(next)) = (HostFixture::new().await, HostFixture::new().await) else { return };
    let (there, home) = (fixture.remote("r", "savepoint"), fixture.here.path().join("savepoint"));
    std::fs::create_dir_all(there.parent().unwrap()).unwrap();
    let mut seen = Stamp::default();
    let limit = Bytes::from_mib(1);
    macro_rules! comes {
        () => {
            fixture.host.fetch_save_point("r", &home, limit, &mut seen).await.unwrap()
        };
    }
    assert!(!comes!(), "there is none yet");
    let write = |content: &[u8]| {
        let part = there.with_extension("part");
        std::fs::write(&part, content).unwrap();
        std::fs::rename(part, &there).unwrap();
    };
    write(b"layer 1");
    assert!(comes!() && !comes!(), "once each");
    write(b"layer 2");
    assert!(comes!());
    write(&vec![0; 2 << 20]);
    assert!(!comes!(), "too large");
    std::fs::remove_file(&there).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", &there).unwrap();
    assert!(!comes!(), "no link is followed");
    assert_eq!(std::fs::read(&home).unwrap(), b"layer 2");

    next.host.put_save_point("r", &home).await.unwrap();
    assert_eq!(std::fs::read(next.remote("r", "savepoint")).unwrap(), b"layer 2");
    assert!(next.host.put_save_point("../r", &home).await.is_err());
}
