"""What all tests of refusals ask for: the right class, in one line."""

import pytest

from lorax_train.errors import ModelError


def refusal(call, *args, kind=ModelError):
  """The message of the `kind` that the call raises; it is one line."""
  with pytest.raises(kind) as caught:
    call(*args)
  message = str(caught.value)
  assert message == ' '.join(message.split())
  return message
