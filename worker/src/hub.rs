//! TEMP
/// t
pub struct Hub;
impl Hub {
    /** t */
    pub fn fetch_all(
        &self,
        _a: &str,
        _b: &str,
        _c: &dyn Fn(u64, u64),
    ) -> crate::error::Result<crate::source::Checkpoint> {
        Err(crate::error::WorkerError::network("temp"))
    }
    /** t */
    pub fn fetch_metadata(&self, _a: &str, _b: &str) -> crate::error::Result<crate::source::Checkpoint> {
        Err(crate::error::WorkerError::network("temp"))
    }
    /** t */
    pub fn new(_e: String, _t: Option<String>, _c: std::path::PathBuf) -> crate::error::Result<Self> {
        Ok(Hub)
    }
}
