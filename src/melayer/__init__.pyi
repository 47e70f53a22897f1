"""The public names of melayer, once: `__init__.py` reads them from here and fetches each when it is first used."""

from .census.report import write_scan_report as write_scan_report
from .census.result import ScanResult as ScanResult
from .census.scan import scan as scan
from .data.corpus import Corpus as Corpus
from .errors import (
    ArchitectureError as ArchitectureError,
)
from .errors import (
    InputError as InputError,
)
from .errors import (
    MelayerError as MelayerError,
)
from .errors import (
    ModelError as ModelError,
)
from .errors import (
    OutputError as OutputError,
)
from .errors import (
    ProcessError as ProcessError,
)
from .errors import (
    TrainingError as TrainingError,
)
from .evaluation.evaluate import evaluate as evaluate
from .evaluation.report import write_eval_report as write_eval_report
from .evaluation.result import EvalResult as EvalResult
from .evaluation.select import compare_runs as compare_runs
from .evaluation.select import select as select
from .evaluation.tasks import load_tasks as load_tasks
from .interventions.baked_prefix import BakedPrefix as BakedPrefix
from .interventions.baked_prefix import fixed_prefix as fixed_prefix
from .interventions.comparators import (
    CapWrite as CapWrite,
)
from .interventions.comparators import (
    FlatGamma as FlatGamma,
)
from .interventions.comparators import (
    RemoveNeurons as RemoveNeurons,
)
from .interventions.comparators import (
    SetMassive as SetMassive,
)
from .interventions.load import Loaded as Loaded
from .interventions.load import load as load
from .interventions.mask import WeMask as WeMask
from .measurements.criterion import Criterion as Criterion
from .measurements.explain.explain import explain as explain
from .measurements.explain.result import ExplainResult as ExplainResult
from .measurements.locate.frugal import locate_frugal as locate_frugal
from .measurements.locate.locate import locate as locate
from .measurements.locate.result import LocateResult as LocateResult
from .measurements.perplexity import PerplexityResult as PerplexityResult
from .measurements.perplexity import perplexity as perplexity
from .measurements.rigidity.result import RigidityResult as RigidityResult
from .measurements.rigidity.rigidity import rigidity as rigidity
from .measurements.sinks.result import SinksResult as SinksResult
from .measurements.sinks.sinks import sinks as sinks
from .quantisation.quant_check import quant_check as quant_check
from .quantisation.report import write_quant_report as write_quant_report
from .quantisation.result import QuantCheckResult as QuantCheckResult
from .studies.answers.answers import answers as answers
from .studies.answers.result import AnswersResult as AnswersResult
from .studies.contrast.contrast import (
    contrast as contrast,
)
from .studies.contrast.contrast import (
    measure as measure,
)
from .studies.contrast.report import write_contrast_report as write_contrast_report
from .studies.contrast.result import (
    ContrastResult as ContrastResult,
)
from .studies.contrast.result import (
    Measured as Measured,
)
from .studies.overview import write_report as write_report
from .studies.sweep.result import SweepResult as SweepResult
from .studies.sweep.sweep import sweep as sweep
from .tuning.report import write_tune_report as write_tune_report
from .tuning.result import TuneResult as TuneResult
from .tuning.tune import dpo as dpo
from .tuning.tune import grpo as grpo
from .tuning.tune import sft as sft
from .version import __version__ as __version__
