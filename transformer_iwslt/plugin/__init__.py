"""The fairseq plugin: ``--user-dir transformer_iwslt/plugin`` gives fairseq these models, criterions and task.

fairseq imports a user folder under the folder's own name; what registers is imported under its full name, and so once.
"""

import transformer_iwslt.plugin.criterion
import transformer_iwslt.plugin.model
import transformer_iwslt.plugin.optimizer
import transformer_iwslt.plugin.task  # noqa: F401
