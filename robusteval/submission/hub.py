"""Uploading to a repository on the Hugging Face Hub, with huggingface_hub's own calls."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx2
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash
from pydantic import SecretStr

from robusteval.errors import RobustevalError, UsageError
from robusteval.submission.bundle import FileToSend
from robusteval.submission.endpoint import redacted

ENDPOINT = "https://huggingface.co"
CARD = "README.md"
_FAILURES = (HfHubHTTPError, HFValidationError, httpx2.HTTPError, ValueError, OSError, RuntimeError)


@dataclass(frozen=True)
class Hub:
    """The repository ``repo`` (USER/NAME) on the Hub at ``endpoint``, as `check_endpoint` returned it.

    A model card that somebody else wrote is replaced only with ``replace_card`` or in a pull request.
    """

    endpoint: str
    repo: str
    token: SecretStr = field(repr=False)
    private: bool = False
    pull_request: bool = False
    replace_card: bool = False

    def submit(self, files: Sequence[FileToSend], message: str) -> tuple[str, bool]:
        """Put ``files`` into the repository in one commit, making it first if it is not there.

        Return the commit's address and whether anything was sent: files that are there with the same content are not.
        Raises `UsageError` for a card of somebody else, `RobustevalError` when the Hub refuses or cannot be reached.
        """
        constants.HF_HUB_DISABLE_TELEMETRY = True  # it would ask the public Hub first, whatever the endpoint
        api = HfApi(endpoint=self.endpoint, token=self.token.get_secret_value(), library_name="robusteval")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the Hub's remarks on metadata
                api.create_repo(self.repo, private=self.private, exist_ok=True)
                before = api.repo_info(self.repo).sha
                self._respect_card(api, files)
                commit = self._commit(api, files, message)
        except _FAILURES as error:
            said = redacted(str(error), self.token).rstrip(".")
            raise RobustevalError(f"{self.endpoint} did not take it: {said}.") from None
        return (commit.pr_url or commit.commit_url), commit.oid != before

    def _commit(self, api: HfApi, files: Sequence[FileToSend], message: str) -> CommitInfo:
        additions = [CommitOperationAdd(file.name, str(file.path)) for file in files]
        return api.create_commit(self.repo, additions, commit_message=message, create_pr=self.pull_request)

    def _respect_card(self, api: HfApi, files: Sequence[FileToSend]) -> None:
        ours = [file.path.read_bytes() for file in files if file.name == CARD]
        if self.replace_card or self.pull_request or not ours:
            return
        for there in api.get_paths_info(self.repo, [CARD]):
            if isinstance(there, RepoFile) and there.blob_id != git_hash(ours[0]):
                raise UsageError(
                    f"{self.repo} has another model card: give --pull-request to propose this one, or --replace-card."
                )
