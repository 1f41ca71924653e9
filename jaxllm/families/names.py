"""Naming schemes several families share."""

from jaxllm.families.base import Rule
from jaxllm.families.layouts import fused_qkv, gate_up, grouped_qkv

L = r"(?:model|transformer|gpt_neox|model\.decoder)\.(?:layers|h|blocks)\.(\d+)\."

ENDS = (
    Rule(r"model\.embed_tokens", "embed"),
    Rule(r"model\.norm", "norm"),
    Rule(r"lm_head", "head"),
)
LLAMA = (
    *ENDS,
    Rule(L + r"self_attn\.([qkvo])_proj", r"layers.\1.mixer.\2"),
    Rule(L + r"self_attn\.([qk])_norm", r"layers.\1.mixer.\2_norm"),
    Rule(L + r"self_attn\.qkv_proj", r"layers.\1.mixer", fused_qkv),
    Rule(L + r"mlp\.(gate|up|down)_proj", r"layers.\1.ffn.\2"),
    Rule(L + r"mlp\.gate_up_proj", r"layers.\1.ffn", gate_up),
    Rule(L + r"input_layernorm", r"layers.\1.mixer.pre"),
    Rule(L + r"post_attention_layernorm", r"layers.\1.ffn.pre"),
)
SANDWICH = (
    Rule(L + r"post_attention_layernorm", r"layers.\1.mixer.post"),
    Rule(L + r"pre_feedforward_layernorm", r"layers.\1.ffn.pre"),
    Rule(L + r"post_feedforward_layernorm", r"layers.\1.ffn.post"),
)
GPT2 = (
    Rule(r"(?:transformer\.)?wte", "embed"),
    Rule(r"(?:transformer\.)?wpe", "positions"),
    Rule(r"(?:transformer\.)?ln_f", "norm"),
    Rule(r"lm_head", "head"),
    *(
        Rule(r"(?:transformer\.)?h\.(\d+)\." + name, path, *split)
        for name, path, *split in (
            (r"attn\.c_attn", r"layers.\1.mixer", fused_qkv),
            (r"attn\.c_proj", r"layers.\1.mixer.o"),
            (r"mlp\.c_fc", r"layers.\1.ffn.up"),
            (r"mlp\.c_proj", r"layers.\1.ffn.down"),
            (r"ln_1", r"layers.\1.mixer.pre"),
            (r"ln_2", r"layers.\1.ffn.pre"),
        )
    ),
)
NEOX = (
    Rule(r"gpt_neox\.embed_in|(?:transformer\.)?word_embeddings", "embed"),
    Rule(r"(?:transformer\.)?word_embeddings_layernorm", "embed_norm"),
    Rule(r"gpt_neox\.final_layer_norm|(?:transformer\.)?ln_f|model\.final_layernorm", "norm"),
    Rule(r"embed_out|lm_head", "head"),
    *(
        Rule(r"(?:(?:gpt_neox|transformer|model)\.)?(?:layers|h)\.(\d+)\." + name, path, *split)
        for name, path, *split in (
            (r"(?:attention|self_attention|self_attn)\.query_key_value", r"layers.\1.mixer", grouped_qkv),
            (r"(?:attention|self_attention|self_attn)\.dense", r"layers.\1.mixer.o"),
            (r"self_attn\.([qk])_layernorm", r"layers.\1.mixer.\2_norm"),
            (r"mlp\.dense_h_to_4h", r"layers.\1.ffn.up"),
            (r"mlp\.dense_4h_to_h", r"layers.\1.ffn.down"),
            (r"(?:input_layernorm|ln_attn)", r"layers.\1.mixer.pre"),
            (r"(?:post_attention_layernorm|ln_mlp)", r"layers.\1.ffn.pre"),
        )
    ),
)
MOE = (
    Rule(L + r"(?:mlp|block_sparse_moe)\.(?:gate|router\.layer)", r"layers.\1.ffn.router"),
    Rule(L + r"mlp\.gate\.e_score_correction_bias", r"layers.\1.ffn.router.correction"),
    Rule(L + r"mlp\.experts\.(\d+)\.(gate|up|down)_proj", r"layers.\1.ffn.\3@\2"),
    Rule(L + r"block_sparse_moe\.experts\.(\d+)\.w1", r"layers.\1.ffn.gate@\2"),
    Rule(L + r"block_sparse_moe\.experts\.(\d+)\.w2", r"layers.\1.ffn.down@\2"),
    Rule(L + r"block_sparse_moe\.experts\.(\d+)\.w3", r"layers.\1.ffn.up@\2"),
    Rule(L + r"mlp\.shared_experts?\.(gate|up|down)_proj", r"layers.\1.ffn.shared.\2"),
    Rule(L + r"mlp\.shared_expert_gate", r"layers.\1.ffn.shared_gate"),
)
