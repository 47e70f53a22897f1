"""The public types as a user's type checker sees them; mypy reads this file, nothing runs it."""

from typing import assert_type

from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

import melayer

loaded = melayer.load("demo")
assert_type(loaded.model, PreTrainedModel)
assert_type(loaded.tokenizer, PreTrainedTokenizerBase)
assert_type(loaded.mask, melayer.WeMask | None)
located = melayer.locate(loaded.model, loaded.tokenizer)
assert_type(located, melayer.LocateResult)
assert_type(located.me_layer, int | None)
assert_type(located.settings["n_tokens"], int)
assert_type(melayer.sinks(loaded.model, loaded.tokenizer), melayer.SinksResult)
assert_type(melayer.scan(loaded.model, loaded.tokenizer, "corpus.txt"), melayer.ScanResult | None)
mask = melayer.WeMask.from_located(located)
assert_type(mask.bake(loaded.model, [1]), Cache)
# An error that mypy does not see here would be reported as an unused comment.
melayer.locate(3, loaded.tokenizer)  # type: ignore[arg-type]
melayer.explain(loaded.model, "demo")  # type: ignore[arg-type]
mask.apply(loaded.tokenizer)  # type: ignore[arg-type]
