//! Keys without effect on a forward pass over whole sequences, with the reason.

/// Keys, and why they have no effect.
pub(in crate::model::arch) type Unused = (&'static str, &'static [&'static str]);

/// Keys of every family.
pub(in crate::model::arch) const COMMON: &[Unused] = &[
    (
        "training alone uses it",
        &[
            "attention_dropout",
            "aux_loss_alpha",
            "gradient_checkpointing",
            "initializer_range",
            "output_router_logits",
            "pretraining_tp",
            "router_aux_loss_coef",
            "router_jitter_noise",
            "seq_aux",
        ],
    ),
    (
        "generation alone uses it",
        &[
            "bad_words_ids",
            "begin_suppress_tokens",
            "decoder_start_token_id",
            "diversity_penalty",
            "do_sample",
            "early_stopping",
            "encoder_no_repeat_ngram_size",
            "exponential_decay_length_penalty",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "length_penalty",
            "max_length",
            "min_length",
            "no_repeat_ngram_size",
            "num_beam_groups",
            "num_beams",
            "num_return_sequences",
            "output_scores",
            "prefix",
            "remove_invalid_values",
            "repetition_penalty",
            "return_dict_in_generate",
            "suppress_tokens",
            "task_specific_params",
            "temperature",
            "top_k",
            "top_p",
            "typical_p",
            "use_cache",
        ],
    ),
    (
        "the tokenizer's files say it",
        &["bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "tokenizer_class"],
    ),
    (
        "it says how Python runs the model",
        &[
            "_attn_implementation",
            "_attn_implementation_autoset",
            "attn_implementation",
            "auto_map",
            "chunk_size_feed_forward",
            "experts_implementation",
            "output_attentions",
            "output_hidden_states",
            "return_dict",
            "torchscript",
            "use_return_dict",
        ],
    ),
    ("classifiers alone use it", &["finetuning_task", "id2label", "label2id", "num_labels", "problem_type"]),
    ("`--precision` says what is computed in; each tensor says how it is stored", &["dtype", "torch_dtype"]),
    ("it names the file of the weights", &["transformers_weights"]),
    ("it says where the file comes from", &["_commit_hash", "_name_or_path", "name_or_path", "transformers_version"]),
    (
        "layers that predict later tokens are not part of the main stack",
        &["num_mtp_layers", "num_nextn_predict_layers"],
    ),
];

/// Why a key has no effect; `None` if it may have one.
pub(in crate::model::arch) fn reason(key: &str, family: &[Unused]) -> Option<&'static str> {
    COMMON.iter().chain(family).find(|(_, keys)| keys.contains(&key)).map(|(why, _)| *why)
}
