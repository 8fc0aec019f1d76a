"""mistral.rs on the CPU. It takes text and gives text: continuations are encoded again, and there are no losses.

Option: dtype=F32.
"""

from engine import main
from mistralrs import CompletionRequest, ModelDType, Runner, Which
from tokenizers import Tokenizer


def run(folder, prompts, windows, new, options):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    which = Which.Plain(model_id=str(folder.resolve()), dtype=getattr(ModelDType, options.get("dtype", "F32")))
    runner = Runner(which=which, no_paged_attn=True, max_seqs=1, prefix_cache_n=0)
    made = []
    for prompt in prompts:
        request = CompletionRequest(
            prompt=tokenizer.decode(prompt), model="default", max_tokens=new, temperature=0.0, top_k=1, ignore_eos=True
        )
        text = runner.send_completion_request(request).choices[0].text
        made.append(text)
    return {"continuations": [], "texts": made, "losses": []}


main(run)
