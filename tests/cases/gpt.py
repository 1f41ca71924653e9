"""GPT-2 and what followed it with LayerNorm."""

from tests.cases.case import Case

GPT2 = dict(vocab_size=96, n_embd=64, n_layer=3, n_head=4, n_positions=128)

CASES = {
    "gpt2": Case("gpt2", GPT2),
    "gpt2-relu": Case("gpt2", GPT2 | dict(activation_function="relu", n_inner=80)),
    "gpt_bigcode": Case("gpt_bigcode", GPT2),
    "gpt_bigcode-mha": Case("gpt_bigcode", GPT2 | dict(multi_query=False)),
}
