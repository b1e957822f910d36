"""The fairseq plugin: ``--user-dir transformer_iwslt/plugin`` gives fairseq these models, criterions and this task.

fairseq imports this folder under the folder's own name. The modules below register themselves; they are imported under their
full names, so that each registers once.
"""

import transformer_iwslt.plugin.criterion
import transformer_iwslt.plugin.model
import transformer_iwslt.plugin.optimizer
import transformer_iwslt.plugin.task  # noqa: F401
