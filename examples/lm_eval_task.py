"""A task of lm_eval, in five lines: python examples/lm_eval_task.py MODEL.gguf TASK [FOLDER OF TASKS]."""

import sys

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from blockffn.eval.harness.model import BlockffnLM

folder = sys.argv[3] if len(sys.argv) > 3 else None
tasks = TaskManager(include_path=folder, include_defaults=folder is None)
found = simple_evaluate(model=BlockffnLM(sys.argv[1]), tasks=[sys.argv[2]], task_manager=tasks)
print(found["results"][sys.argv[2]])
