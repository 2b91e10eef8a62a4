//! The demo's tokenizer: byte-level BPE like the published model's, trained on the included text
//! on demand. Training breaks ties by token id, so every machine gets the same tokenizer.

use serde_json::{Value, json};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

use crate::corpus::SHAKESPEARE;
use crate::error::{Result, WorkerError};

/// Number of entries, special tokens included.
pub(super) const ENTRIES: usize = 1024;
/// Id of the padding token.
pub(super) const PADDING: usize = 0;
/// Id of the end-of-text token.
pub(super) const END_OF_TEXT: usize = ENTRIES - 1;

const PADDING_TOKEN: &str = "<|padding|>";
const END_OF_TEXT_TOKEN: &str = "<|endoftext|>";

/// Trains the tokenizer. Returns the text of tokenizer.json.
pub(super) fn train() -> Result<String> {
    let failed = |error: tokenizers::Error| WorkerError::internal(format!("the demo's tokenizer: {error}"));
    let special = |content: &str| AddedToken::from(content, true).normalized(false);
    let mut trainer = TrainerWrapper::BpeTrainer(
        BpeTrainer::builder()
            .vocab_size(ENTRIES - 1)
            .show_progress(false)
            .special_tokens(vec![special(PADDING_TOKEN)])
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build(),
    );
    let byte_level = ByteLevel::default().add_prefix_space(false);
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_normalizer(Some(NFC)).map_err(failed)?;
    tokenizer.with_pre_tokenizer(Some(byte_level)).with_decoder(Some(byte_level));
    tokenizer.with_post_processor(Some(byte_level.trim_offsets(false)));
    tokenizer.train(&mut trainer, std::iter::once(SHAKESPEARE)).map_err(failed)?;
    tokenizer.add_special_tokens([special(END_OF_TEXT_TOKEN)]).map_err(failed)?;
    tokenizer.to_string(true).map_err(failed)
}

/// Content of tokenizer_config.json.
pub(super) fn config(max_positions: usize) -> Value {
    json!({
        "add_bos_token": false,
        "add_eos_token": false,
        "bos_token": null,
        "clean_up_tokenization_spaces": false,
        "eos_token": END_OF_TEXT_TOKEN,
        "model_max_length": max_positions,
        "pad_token": PADDING_TOKEN,
        "tokenizer_class": "GPTNeoXTokenizer"
    })
}

/// Content of special_tokens_map.json.
pub(super) fn special_tokens() -> Value {
    json!({"eos_token": END_OF_TEXT_TOKEN, "pad_token": PADDING_TOKEN})
}
