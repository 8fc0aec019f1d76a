"""llama.cpp's converter for tokenizers whose hash it does not know: gguf_any_vocabulary.py LLAMA_CPP KEEP ARGUMENTS...

The ids are ours in every run, so which pre-tokenizer the file names does not matter. KEEP is a comma-separated list of tensor
names that stay in F32 whatever --outtype says, as `llama-quantize --tensor-type` does; it may be empty.
"""

import runpy
import sys

root, keep = sys.argv[1:3]
sys.path[:0] = [root, f"{root}/gguf-py"]
import conversion.base as base  # noqa: E402

known = base.TextModel.get_vocab_base_pre


def pre_tokenizer(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        return "gpt-2"


add = base.gguf.SpecialVocab.add_to_gguf


def with_merges(self, writer, quiet=False):
    # A tokenizer of bytes has no merges, which libllama refuses.
    self.merges = self.merges or ["a b"]
    add(self, writer, quiet)


base.TextModel.get_vocab_base_pre = pre_tokenizer
base.gguf.SpecialVocab.add_to_gguf = with_merges
if keep:
    quant = base.ModelBase.tensor_force_quant

    def kept(self, name, new_name, bid, n_dims):
        if any(k in new_name for k in keep.split(",")):
            return base.gguf.GGMLQuantizationType.F32
        return quant(self, name, new_name, bid, n_dims)

    base.ModelBase.tensor_force_quant = kept
sys.argv = [f"{root}/convert_hf_to_gguf.py", *sys.argv[3:]]
runpy.run_path(sys.argv[0], run_name="__main__")
