"""What each project calls the parts of a vision transformer -> timm's names: patterns and replacements, in order."""

TIMM = ((r"^register_tokens$", "reg_token"), (r"\bmlp\.w12\b", "mlp.fc1"), (r"\bmlp\.w3\b", "mlp.fc2"),
        (r"\bgamma_([12])$", r"ls\1.gamma"))  # fmt: skip

TORCHVISION = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\bln_([12])\.", r"norm\1."),
    (r"\bself_attention\.in_proj_", "attn.qkv."),
    (r"\bself_attention\.out_proj\.", "attn.proj."),
    (r"\bmlp\.(0|linear_1)\.", "mlp.fc1."),
    (r"\bmlp\.(3|linear_2)\.", "mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
)

# transformers: as saved, and as its version 5 has them in memory.
HUGGINGFACE = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.layer|encoder\.layers|layers|layer)\.(\d+)\.", r"blocks.\2."),
    (r"\battention\.(attention\.)?(query|q_proj)\.(\w+)$", r"attn.qkv.\3#0"),
    (r"\battention\.(attention\.)?(key|k_proj)\.(\w+)$", r"attn.qkv.\3#1"),
    (r"\battention\.(attention\.)?(value|v_proj)\.(\w+)$", r"attn.qkv.\3#2"),
    (r"\battention\.(output\.dense|o_proj)\.", "attn.proj."),
    (r"\blayernorm_before\.", "norm1."),
    (r"\blayernorm_after\.", "norm2."),
    (r"\bintermediate\.dense\.", "mlp.fc1."),
    (r"\boutput\.dense\.", "mlp.fc2."),
    (r"\bmlp\.weights_in\.", "mlp.fc1."),
    (r"\bmlp\.weights_out\.", "mlp.fc2."),
    (r"\blayer_scale([12])\.lambda1$", r"ls\1.gamma"),
    (r"^layernorm\.", "norm."),
)

OPENMMLAB = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.(\d+)\.", r"blocks.\1."),
    (r"\bblocks\.(\d+)\.ln([12])\.", r"blocks.\1.norm\2."),
    (r"\bffn\.layers\.0\.0\.", "mlp.fc1."),
    (r"\bffn\.layers\.1\.", "mlp.fc2."),
    (r"^ln1\.", "norm."),
)

CLIP = (
    (r"^conv1\.", "patch_embed.proj."),
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.(\d+)\.", r"blocks.\1."),
    (r"\bln_([12])\.", r"norm\1."),
    (r"\bls_([12])\.", r"ls\1."),
    (r"\battn\.in_proj_", "attn.qkv."),
    (r"\battn\.out_proj\.", "attn.proj."),
    (r"\bmlp\.c_fc\.", "mlp.fc1."),
    (r"\bmlp\.c_proj\.", "mlp.fc2."),
)

# timm keeps the query of the attention that pools apart from its keys and values.
SIGLIP = (
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.in_proj_", "attn_pool.in_proj."),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
)

HUGGINGFACE_CLIP = (
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."),
    (r"^encoder\.layers\.(\d+)\.", r"blocks.\1."),
    (r"\bself_attn\.q_proj\.(\w+)$", r"attn.qkv.\1#0"),
    (r"\bself_attn\.k_proj\.(\w+)$", r"attn.qkv.\1#1"),
    (r"\bself_attn\.v_proj\.(\w+)$", r"attn.qkv.\1#2"),
    (r"\bself_attn\.out_proj\.", "attn.proj."),
    (r"\blayer_norm([12])\.", r"norm\1."),
    (r"^visual_projection\.", "head."),
)
