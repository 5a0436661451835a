// A picture from the camera, taken when the user says so; nothing leaves the page before.

const at = (id) => document.getElementById(id);

export const available = () => Boolean(navigator.mediaDevices?.getUserMedia);

// A JPEG, or null if the user thought better of it. Throws if there is no camera, or no permission.
export async function picture() {
  const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "user" } });
  const dialog = at("camera");
  const film = at("viewfinder");
  film.srcObject = stream;
  dialog.showModal();
  try {
    const taken = await new Promise((done) => {
      at("take").onclick = () => done(true);
      at("cancel").onclick = () => done(false);
      dialog.oncancel = () => done(false);
    });
    if (!taken) return null;
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [film.videoWidth, film.videoHeight];
    canvas.getContext("2d").drawImage(film, 0, 0);
    return await new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.95));
  } finally {
    dialog.close();
    film.srcObject = null;
    stream.getTracks().forEach((track) => track.stop());
  }
}
