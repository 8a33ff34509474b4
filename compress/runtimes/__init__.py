"""The engines that run an artifact, a folder each."""

RUNTIMES = {
    "endpoint": "compress.runtimes.endpoint.runtime:Endpoint",
    "onnxruntime": "compress.runtimes.onnxruntime.runtime:Onnxruntime",
    "onnxruntime-genai": "compress.runtimes.onnxruntime_genai.runtime:OnnxruntimeGenai",
    "transformers": "compress.runtimes.transformers.runtime:Transformers",
    "vllm": "compress.runtimes.vllm.runtime:Vllm",
}
"""The runtimes a recipe can name: runtime → the class whose fields are its keys."""
