"""The compression methods, one file each."""

STAGES = {
    "awq": "compress.stages.awq:Awq",
    "fp8": "compress.stages.fp8:Fp8",
    "gptq": "compress.stages.gptq:Gptq",
    "int8": "compress.stages.int8:Int8",
    "llmcompressor": "compress.stages.llmcompressor:Llmcompressor",
    "rtn": "compress.stages.rtn:Rtn",
}
"""The stages a recipe can name: stage → the class whose fields are its keys."""
